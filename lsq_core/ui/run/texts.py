"""A prompt, and what the full-precision and the quantized model write after it, side by side."""

from __future__ import annotations

from html import escape

from lsq_core import disk, jobs
from lsq_core.jobs import Job
from lsq_core.store.store import Store
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.safe import st

_PROMPT = "Return the number of"
#: What the tokens look like. Where the texts part there is a box and a line, not colour alone.
_STYLE = """
<style>
.lsq-text { white-space: pre-wrap; line-height: 1.6; font-size: .95rem; padding: .6rem .8rem;
  border: 1px solid rgba(138,146,156,.4); border-radius: .4rem; min-height: 8rem; }
.lsq-text .prompt { opacity: .6; }
.lsq-text .token { position: relative; border-radius: .2rem; cursor: help; }
.lsq-text .other { border-bottom: 2px dotted #D55E00; }
.lsq-text .parts { background: rgba(213,94,0,.22); font-weight: 700;
  text-decoration: underline double #D55E00; outline: 1px solid #D55E00; }
.lsq-text .token:hover, .lsq-text .token:focus { background: rgba(0,114,178,.25); }
.lsq-text .token:hover::after, .lsq-text .token:focus::after {
  content: attr(data-odds); position: absolute; left: 0; top: 1.6em; z-index: 9; width: max-content;
  max-width: 19rem; white-space: pre-line; font: 400 .8rem/1.4 sans-serif; padding: .35rem .55rem;
  background: #1c2530; color: #fff; border-radius: .3rem; text-decoration: none; }
</style>
"""


def show(store: Store, job: Job, model: list[str]) -> None:
    """The form, and the newest texts of this run."""
    run, folder = job.result()["run"], disk.jobs_folder(store)
    with st.form("prompt_form", border=False):
        columns = st.columns([3.4, 0.9, 0.9, 0.8, 0.9], vertical_alignment="bottom")
        prompt = columns[0].text_area("Prompt", _PROMPT, key="prompt", height=68)
        tokens = columns[1].number_input("Tokens", 1, 2000, 60, key="prompt_tokens")
        heat = columns[2].number_input(
            "Temperature",
            0.0,
            5.0,
            0.0,
            0.1,
            key="prompt_temperature",
            help="0 takes the most probable token each time. Above, both models draw with the "
            "same noise, so that they part only where their predictions do.",
        )
        seed = columns[3].number_input("Seed", 0, key="prompt_seed")
        asked = columns[4].form_submit_button("Write", icon=":material/edit_note:", type="primary")
    if asked:
        words_of = ["generate", "--run", run, f"--prompt={prompt}"]
        words_of += ["--max-new-tokens", str(tokens)]
        words_of += ["--temperature", f"{heat:g}", "--seed", str(seed), *model]
        jobs.start(folder, [*words_of, "--db", str(store.path)])
        st.rerun()
    found = latest(folder, run)
    if found is None:
        st.caption("Both models go on from the prompt; the texts appear here side by side.")
    elif found.state == "done":
        show_texts(found.result())
    else:
        jobs_panel.follow(found)


def latest(folder: object, run: str) -> Job | None:
    """The newest texts that were asked of a run."""
    written = (job for job in jobs.list_jobs(folder) if job.verb == "generate")
    return next((job for job in written if run in job.given("--run")), None)


def show_texts(found: dict) -> None:
    """Both texts, where they part, and how alike the two models are along the first."""
    at = found["parts_at"]
    same = "The two texts are the same." if at is None else f"They part at token {at + 1}."
    st.markdown(
        f"**{same}** Along the full-precision text both hold the same token most probable "
        f"{100 * found['agreement']:.0f} % of the time; KL {found['kl']:.4f} nats a token."
    )
    titles = {"full": "Full precision", "quantized": "Quantized"}
    for column, (name, title) in zip(st.columns(2), titles.items(), strict=True):
        with column:
            st.markdown(f"**{title}** · {words.plural(len(found[name]), 'token')}")
            st.html(_STYLE + text_html(found["prompt"], found[name], at))
    drawn = f"at temperature {found['temperature']:g}, seed {found['seed']}"
    how = drawn if found["temperature"] else "greedily"
    st.caption(
        "Boxed and underlined: where the texts part. Dotted: the two models hold different tokens "
        "most probable. Hover, tap or tab to a token for the probability each gives it, at "
        f"temperature 1, after the same text. Written {how}."
    )


def text_html(prompt: str, tokens: list[dict], parts_at: int | None) -> str:
    """A text of which every token tells its odds; nothing of it is taken for markup."""
    spans = [f'<span class="prompt">{escape(prompt)}</span>']
    for number, token in enumerate(tokens):
        kinds = ["token"]
        kinds += ["other"] if token["full_top"] != token["quantized_top"] else []
        kinds += ["parts"] if number == parts_at else []
        odds = escape(odds_of(token), quote=True)
        spans.append(
            f'<span class="{" ".join(kinds)}" tabindex="0" data-odds="{odds}" '
            f'aria-label="{odds}">{escape(shown(token["text"]))}</span>'
        )
    return f'<div class="lsq-text">{"".join(spans)}</div>'


def shown(text: str) -> str:
    """A token's text; a line's end can be seen, and one without text is a dot."""
    return text.replace("\n", "↵\n") if text else "·"


def odds_of(token: dict) -> str:
    """Both probabilities of a token, and what each model holds most probable instead."""
    lines = [f"“{token['text']}”"]
    for name, title in (("full", "full precision"), ("quantized", "quantized")):
        top = token[f"{name}_top"]
        instead = "" if top == token["text"] else f", most probable “{top}”"
        lines.append(f"{title} {100 * token[name]:.1f} %{instead}")
    return "\n".join(lines)
