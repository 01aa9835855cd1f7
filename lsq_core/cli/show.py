"""Readable output for the result of each verb."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lsq_core.bits import DETECTION_CONFIG
from lsq_core.evaluation.divergence import format_distribution
from lsq_core.evaluation.noise import describe_noise, format_figure
from lsq_core.sweep_progress import describe_counts
from lsq_core.units import format_bytes

#: A relative gap to the optimum below this is rounding error.
_OPTIMAL_GAP = 1e-8


def _finite(value: float | None) -> bool:
    """Return whether a figure is finite; JSON contains null for one that is not."""
    return value is not None and math.isfinite(value)


def number(value: float | None, noise: float | None = None) -> str:
    """Format a figure with four decimals, or fewer if noise requires; or say it is not finite."""
    return format_figure(value, noise) if _finite(value) else "not finite"


def percent(share: float | None) -> str:
    """Format a share as a signed percentage, or say that it is not finite."""
    return f"{100 * share:+.2f} %" if _finite(share) else "not finite"


def model(result: dict) -> None:
    """Print a description of a model."""
    print(
        f"{result['model']}: {result['architecture']}, {result['layers']} layers, "
        f"{result['parameters']:,} parameters, {format_bytes(result['file_bytes'])}; "
        f"{100 * result['covered']:.1f} % of them in {len(result['modules'])} planned modules"
    )
    for name in result["left_out"]:
        print(f"kept in full precision because no group size divides it: {name}")
    for note in result["notes"]:
        print(f"note: {note}")


def profile(result: dict) -> None:
    """Print a summary of a profile."""
    provenance = result["provenance"]
    published = provenance.get("origin") == "published"
    tokens = "published, on" if published else f"on {provenance['tokens']:,} tokens of"
    print(
        f"profile {result['profile']} of {result['model']['model']}: {len(result['scores']):,} "
        f"scores {tokens} {provenance['corpus']}"
    )
    for row in result["proxies"]:
        if row["config"] == DETECTION_CONFIG.name:
            print(
                f"  {row['proxy']} ranks the modules as {row['exact']} does at {row['config']} "
                f"with rank correlation {row['rank_correlation']:.3f}"
            )


def plan(result: dict) -> None:
    """Print a plan's size, boosted modules and numbers of configurations; or a ranking."""
    if "methods" in result:
        ranking(result)
        return
    print(
        f"{result['method']}: {result['bits_per_param']:.4f} bits per parameter, "
        f"{format_bytes(result['planned_bytes'])} planned for the linear weights, "
        f"{format_bytes(result['model_bytes'])} with embeddings and norms in full precision"
    )
    for name, rank_value in result["flagged"].items():
        print(f"  {result['modules'][name]['config']:>7}  {name}  ({rank_value:.2f})")
    counts: dict[str, int] = {}
    for entry in result["modules"].values():
        counts[entry["config"]] = counts.get(entry["config"], 0) + 1
    print("  " + ", ".join(f"{n} × {config}" for config, n in sorted(counts.items())))
    if "gap" in result:
        optimal = result["gap"] < _OPTIMAL_GAP
        share = "" if optimal else f"within {100 * result['gap']:.2g} % of "
        print(f"{share}optimal at this budget")
    if any("rows" in entry for entry in result["modules"].values()):
        ratios = [entry["ratio"] for entry in result["modules"].values()]
        print(
            f"high-impact rows: {100 * sum(ratios) / len(ratios):.1f} % of each matrix on average"
        )
    for note in result["notes"]:
        print(note)
    predicted(result["predicted"])
    if "predicted" in result.get("free", {}):
        print(f"without ties and server, at {result['free']['bits_per_param']:.4f} bits:")
        predicted(result["free"]["predicted"])


def ranking(result: dict) -> None:
    """Print every method within a budget, the best by prediction first."""
    order = "" if result["reason"] else ", by predicted perplexity"
    print(f"every method within {result['budget']} on {result['model']}{order}:")
    heads = f"{'predicted perplexity':28} {'expected KL':>12} {'measured':>18}"
    print(f"  {'':24} {heads} nominal bits, planned bytes")
    for row in result["methods"]:
        band, run, divergence = row["predicted"], row["measured"], row["expected_kl"]
        text = f"{band['perplexity']:.2f} ({band['low']:.2f} to {band['high']:.2f})" if band else ""
        kl = "" if divergence is None else f"{divergence:.3g} nats"
        at = f"{run['perplexity']:.2f} at {run['bits_per_param']:.2f}" if run else ""
        size = f"{row['bits_per_param']:.3f} bits, {format_bytes(row['planned_bytes'])}"
        print(f"  {row['method']:24} {text:28} {kl:>12} {at:>18} {size}")
    if result["reason"]:
        print(f"no predicted perplexity: {result['reason']}")
    for name, reason in result["left_out"].items():
        print(f"  {name} left out: {reason}")


def predicted(result: dict) -> None:
    """Print a predicted perplexity with its band, or why there is none."""
    if "reason" in result:
        print(f"no predicted perplexity: {result['reason']}")
        return
    beyond = ", extrapolated" if result["extrapolated"] else ""
    change = result["perplexity"] / result["full_precision"] - 1
    print(
        f"predicted perplexity {result['perplexity']:.4f} ({result['low']:.4f} to "
        f"{result['high']:.4f}, 90 % band) on {result['corpus']} ({result['protocol']}), from "
        f"{result['runs']} runs{beyond}; {percent(change)} from full precision, "
        f"{result['full_precision']:.4f}"
    )


def run(result: dict) -> None:
    """Print a plan and its measured results."""
    plan(result)
    figures(result)
    change = result["increase"]
    interval = f"95 % interval {percent(change['low'])} to {percent(change['high'])}"
    if not _finite(change["low"]):
        interval = "too few windows for an interval"
    floor = result.get("noise") or {}
    full = number(result["perplexity_full"], floor.get("perplexity"))
    kl = number(result["kl"], floor.get("kl"))
    print(
        f"full precision {full}: {percent(change['relative'])} ({interval}), KL {kl} nats, "
        f"top-1 agreement {100 * result['top1']:.1f} %"
    )
    if result.get("divergence"):  # missing in jobs of older versions
        print(f"KL by token: {format_distribution(result['divergence'])}")
    if "export" in result:
        converted(result["export"])
    if "seconds" in result:  # missing in jobs of older versions
        times(result["seconds"])


def converted(result: dict) -> None:
    """Print what was written in another format, and its measured figures if there are any."""
    kinds: dict[str, int] = {}
    for stored in result["types"].values():
        kinds[stored["name"]] = kinds.get(stored["name"], 0) + 1
    print(
        f"{result['format']}: {format_bytes(result['measured_bytes'])} for the linear weights ("
        + ", ".join(f"{count} × {name}" for name, count in sorted(kinds.items()))
        + f"), {format_bytes(result['measured_model_bytes'])} for the model, in "
        f"{result['saved_to']}"
    )
    if "perplexity" in result:
        print(f"as run {result['run']}, exported from {result['exported_from']}: ", end="")
        figures(result)


def times(seconds: dict) -> None:
    """Print the time of a run by stage, the longest first."""
    whole = seconds["whole"]
    parts = {name: taken for name, taken in seconds.items() if name != "whole"}
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(
        f"{name} {duration(taken)}" for name, taken in ordered if taken >= 0.01 * whole
    )
    print(f"took {duration(whole)}: {listed}")


def figures(result: dict) -> None:
    """Print a perplexity and what it was measured on."""
    cut = ", limited by max-tokens" if result["truncated"] else ""
    floor = result.get("noise") or {}  # missing in jobs of older versions
    print(
        f"perplexity {number(result['perplexity'], floor.get('perplexity'))} on "
        f"{result['tokens']:,} tokens of {result['corpus']} ({result['protocol']}{cut})"
    )
    if floor:
        print(f"numerical noise: {describe_noise(floor)}")


def noise(result: dict) -> None:
    """Print the figures of each condition, and the noise floor."""
    print(f"{'':<22} {'full precision':>16} {'plan':>16} {'KL':>12}")
    for row in result["conditions"]:
        print(
            f"{row['name']:<22} {row['perplexity_full']:>16.8f} {row['perplexity']:>16.8f} "
            f"{row['kl']:>12.8f}"
        )
    floor = result["noise"]
    print(f"numerical noise of {result['model']}, {floor['protocol']} in {floor['dtype']}:")
    print(describe_noise(floor))


def sweep(result: dict) -> None:
    """Print one row per item, and a count of the outcomes."""
    head = ("method", "size", "quant.", "corpus", "bits", "steps", "measured", "perplexity")
    head += ("change", "seconds", "")
    print("{:<20} {:<9} {:<6} {:<12} {:>7} {:>5} {:>10} {:>11} {:>9} {:>8}  {}".format(*head))
    for row in result["items"]:
        prefix = f"{row['method']:<20} {row['base'] or row['budget']:<9} {row['quantizer']:<6}"
        prefix += f" {str(row['corpus'])[-12:]:<12}"
        if row["state"] == "failed":
            print(f"{prefix} failed: {row['reason']}")
            continue
        print(
            f"{prefix} {row['bits_per_param']:>7.4f} {row['steps']:>5} "
            f"{format_bytes(row['measured_bytes']):>10} {number(row['perplexity']):>11} "
            f"{percent(row['increase']):>9} {row['quantize_seconds']:>8.1f}  "
            f"{row['state']} as run {row['run']}"
        )
    print(f"{describe_counts(result['items'])}, on {result['model']}")


def audit(result: dict) -> None:
    """Print the verdict, and every matrix that is not as planned."""
    print(result["verdict"])
    for line in result["modules"]:
        if not line["agrees"]:
            print(
                f"  {line['module']}: planned {line['planned']} ({line['planned_bytes']:,} bytes), "
                f"stored {line['stored']} ({line['stored_bytes']:,} bytes)"
            )
    print(f"({result['source']})")


def generated(result: dict) -> None:
    """Print both texts, mark the first token that differs, and print its probabilities."""
    at = result["parts_at"]
    for name, title in (("full", "full precision"), ("quantized", "quantized")):
        texts = [token["text"] for token in result[name]]
        parted = texts if at is None else [*texts[:at], " ⟦", *texts[at : at + 1], "⟧ "]
        rest = [] if at is None else texts[at + 1 :]
        print(f"--- {title}\n{result['prompt']}{''.join([*parted, *rest])}")
    if at is None:
        print("--- the two texts are identical")
    else:
        print(f"--- first difference at token {at + 1}:")
        for name, title in (("full", "full precision"), ("quantized", "quantized")):
            for token in result[name][at : at + 1]:
                print(
                    f"  {title} generated {token['text']!r}: {100 * token['full']:.1f} % in full "
                    f"precision, {100 * token['quantized']:.1f} % quantized"
                )
    print(
        f"along the full-precision text: top-1 agreement {100 * result['agreement']:.0f} %, "
        f"KL {result['kl']:.4f} nats per token"
    )


def jobs(result: dict) -> None:
    """Print the jobs as a table."""
    if not result["jobs"]:
        print("no background jobs")
    for job in result["jobs"]:
        share = f"{100 * job['done'] // job['total']:d} %" if job["total"] > 1 else ""
        print(f"{job['id']}  {job['state']:<11} {job['stage']:<9} {share:>5}  {job['message']}")
        print(f"    {job['command']}")


def resumed(result: dict, shows: Mapping[str, Callable[[dict], None]]) -> None:
    """Print the result of a job in the form of its verb; ``shows`` maps verbs to functions."""
    print(f"job {result['job']} is done")
    shows[result["verb"]](result["result"])


def results(result: dict) -> None:
    """Print the runs as a table, with the number of tokens that each was evaluated on."""
    heads = f"{'bits':>7} {'MiB':>9} {'perplexity':>11} {'tokens':>9}"
    print(f"{'model':<24} {'method':<20} {heads}  corpus")
    for row in result["results"]:
        # The bytes of linear weights are unknown for published runs.
        size = row["measured_bytes"]
        mib = "–" if size is None else f"{size / 2**20:.2f}"
        perplexity, tokens = number(row["perplexity"], row["noise"]), _tokens(row["tokens"])
        print(
            f"{str(row['model'])[-24:]:<24} {row['method']:<20} {row['bits_per_param']:>7.4f} "
            f"{mib:>9} {perplexity:>11} {tokens:>9}  {row['corpus']} ({row['protocol']})"
            + (", saved model re-evaluated" if row["saved_model"] else "")
        )


def _tokens(count: float | None) -> str:
    """Format a number of tokens, which is unknown for published runs."""
    return "–" if count is None else f"{count:,.0f}"


def exported(result: dict) -> None:
    """Print the file that was written, its number of runs and its size."""
    many = "" if result["runs"] == 1 else "s"
    print(f"{result['out']}: {result['runs']} run{many}, {format_bytes(result['bytes'])}")


def imported(result: dict) -> None:
    """Print what was imported, and what is flawed or missing."""
    counts = ", ".join(f"{count:,} {table}" for table, count in result["counts"].items())
    print(f"{result['source']}: {counts}")
    for sentence in [*result["flawed"], *result["missing"]]:
        print(f"  {sentence}")


def disk(result: dict) -> None:
    """Print the items stored on disk."""
    for item in result["kept"]:
        reason = f"  (cannot be pruned: {item['reason']})" if item["reason"] else ""
        print(f"{format_bytes(item['bytes']):>12}  {item['kind']:<16} {item['name']}{reason}")


def repaired(result: dict) -> None:
    """Print the numbers of rows copied and lost."""
    for row in result["tables"]:
        lost = f", {row['lost']:,} lost" if row["lost"] else ""
        print(f"{row['table']:<14} {row['copied']:>10,} rows{lost}")
    print(f"Written to {result['out']}.")


#: Column headers of the table of benchmarks.
_BENCH_HEADERS = ("", "ours", "theirs", "ratio", "error", "noise", "target")


def bench(result: dict) -> None:
    """Print one row per benchmark, and the machine it was measured on."""
    print("{:<52} {:>9} {:>9} {:>8}  {:<22} {:>6}  {}".format(*_BENCH_HEADERS))
    for row in result["rows"]:
        if row["reason"]:
            print(f"{row['what']:<52} not measured: {row['reason']}")
            continue
        print("{:<52} {:>9} {:>9} {:>8}  {:<22} {:>6}  {}".format(*_bench_cells(row)))
        sides = f"{row['ours']}; theirs: {row['theirs']}" if row["theirs"] else row["ours"]
        print(f"    {row['id']}: {sides}" + (f"; {row['error_is']}" if row["error_is"] else ""))
    print(_bench_machine(result))


def bench_markdown(result: dict) -> None:
    """Print the same as a Markdown table."""
    print(f"| {' | '.join(_BENCH_HEADERS)} |\n|---|{'---:|' * 3}---|---:|---|")
    for row in result["rows"]:
        if row["reason"]:
            print(f"| {row['what']} | not measured: {row['reason']} | | | | | |")
            continue
        what, *figures = _bench_cells(row)
        sides = f"{row['ours']}, against {row['theirs']}" if row["theirs"] else row["ours"]
        print(f"| {what}: {sides} | {' | '.join(figures)} |")
    print(f"\n{_bench_machine(result)}")


def _bench_cells(row: dict) -> list[str]:
    """Return the formatted cells of a measured row, in the order of the headers."""
    aims = [f"≥ {row['target']:g}×"] if row["target"] is not None else []
    aims += [f"≤ {duration(row['most_s'])}"] if row["most_s"] is not None else []
    verdict = " (missed)" if row["missed"] else ""
    error = "–"
    if row["error"] is not None:
        beyond = ", EXCEEDED" if row["wrong"] else ""
        error = f"{row['error']:.2g} (limit {row['error_limit']:g}{beyond})"
    return [
        row["what"],
        duration(row["ours_s"]),
        "–" if row["theirs_s"] is None else duration(row["theirs_s"]),
        "–" if row["ratio"] is None else f"{row['ratio']:.3g}×",
        error,
        "–" if row["noise"] is None else f"±{100 * row['noise']:.0f} %",
        (", ".join(aims) or "–") + verdict,
    ]


def _bench_machine(result: dict) -> str:
    machine_parts = ", ".join(
        filter(None, (result.get("gpu"), result["processor"], result["machine"]))
    )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured with {result['threads']} threads on {machine_parts}; {versions}."


def duration(seconds: float) -> str:
    """Format 0.0123 as ``12.3 ms``, with three significant figures."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
