"""Continuations of a prompt by the full-precision and the quantized model, side by side."""

from __future__ import annotations

from html import escape

from lsq_core import disk, jobs
from lsq_core.jobs import Job
from lsq_core.store.store import Store
from lsq_core.ui import jobs_panel, words
from lsq_core.ui.safe import st

_PROMPT = "Return the number of"
#: Styles of the tokens. The first difference is boxed and underlined, not only coloured.
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
    """Show the form, and the newest texts of this run."""
    run, folder = job.result()["run"], disk.jobs_folder(store)
    with st.form("prompt_form", border=False):
        columns = st.columns([3.4, 0.9, 0.9, 0.8, 0.9], vertical_alignment="bottom")
        prompt = columns[0].text_area("Prompt", _PROMPT, key="prompt", height=68)
        tokens = columns[1].number_input("Tokens", 1, 2000, 60, key="prompt_tokens")
        temperature = columns[2].number_input(
            "Temperature",
            0.0,
            5.0,
            0.0,
            0.1,
            key="prompt_temperature",
            help="0 always takes the most probable token. Above 0, both models sample with the "
            "same noise, so that they diverge only where their predictions do.",
        )
        seed = columns[3].number_input("Seed", 0, key="prompt_seed")
        submitted = columns[4].form_submit_button(
            "Generate", icon=":material/edit_note:", type="primary"
        )
    if submitted:
        argv = ["generate", "--run", run, f"--prompt={prompt}"]
        argv += ["--max-new-tokens", str(tokens)]
        argv += ["--temperature", f"{temperature:g}", "--seed", str(seed), *model]
        jobs.start(folder, [*argv, "--db", str(store.path)])
        st.rerun()
    texts = latest(folder, run)
    if texts is None:
        st.caption("Both models continue the prompt; their texts appear here side by side.")
    elif texts.state == "done":
        show_texts(texts.result())
    else:
        jobs_panel.follow(texts)


def latest(folder: object, run: str) -> Job | None:
    """Return the newest job that generated texts for a run, or None."""
    written = (job for job in jobs.list_jobs(folder) if job.verb == "generate")
    return next((job for job in written if run in job.option_values("--run")), None)


def show_texts(texts: dict) -> None:
    """Show both texts, their first difference, and the models' agreement along the first text."""
    divergence = texts["parts_at"]
    verdict = (
        "The two texts are identical."
        if divergence is None
        else f"First difference at token {divergence + 1}."
    )
    st.markdown(
        f"**{verdict}** Along the full-precision text, both have the same top token "
        f"{100 * texts['agreement']:.0f} % of the time; KL {texts['kl']:.4f} nats per token."
    )
    titles = {"full": "Full precision", "quantized": "Quantized"}
    for column, (name, title) in zip(st.columns(2), titles.items(), strict=True):
        with column:
            st.markdown(f"**{title}** · {words.plural(len(texts[name]), 'token')}")
            st.html(_STYLE + render_text_html(texts["prompt"], texts[name], divergence))
    drawn = f"at temperature {texts['temperature']:g}, seed {texts['seed']}"
    how = drawn if texts["temperature"] else "greedily"
    st.caption(
        "Boxed and underlined: the first difference. Dotted: the models' top tokens differ. "
        "Hover, tap or tab to a token for the probability that each model gives it, at "
        f"temperature 1, after the same text. Generated {how}."
    )


def render_text_html(prompt: str, tokens: list[dict], divergence_index: int | None) -> str:
    """Render a text as HTML in which each token shows its probabilities; all text is escaped."""
    spans = [f'<span class="prompt">{escape(prompt)}</span>']
    for number, token in enumerate(tokens):
        css_classes = ["token"]
        css_classes += ["other"] if token["full_top"] != token["quantized_top"] else []
        css_classes += ["parts"] if number == divergence_index else []
        probabilities = escape(describe_probabilities(token), quote=True)
        spans.append(
            f'<span class="{" ".join(css_classes)}" tabindex="0" data-odds="{probabilities}" '
            f'aria-label="{probabilities}">{escape(visible_text(token["text"]))}</span>'
        )
    return f'<div class="lsq-text">{"".join(spans)}</div>'


def visible_text(text: str) -> str:
    """Return a token's text with visible line ends, or a dot if it is empty."""
    return text.replace("\n", "↵\n") if text else "·"


def describe_probabilities(token: dict) -> str:
    """Describe a token's probability in both models, and each model's top token if it differs."""
    lines = [f"“{token['text']}”"]
    for name, title in (("full", "full precision"), ("quantized", "quantized")):
        top = token[f"{name}_top"]
        instead = "" if top == token["text"] else f", top token “{top}”"
        lines.append(f"{title} {100 * token[name]:.1f} %{instead}")
    return "\n".join(lines)
