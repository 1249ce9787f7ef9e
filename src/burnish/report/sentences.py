"""The sentences of an Explanation: what came out, how to get it, how it was measured."""

from __future__ import annotations

from burnish._text import human_us
from burnish.report import digest
from burnish.report.data import CUDA_GRAPH, NOT_IN_USE, Explanation, Profile

GAPS = "under the profiler, which slows the host: the gaps are longer than in a call"
"""What a reader has to know of a timeline that is mostly gaps."""

COUNTED_ONCE = "An op that two rewrites take counts once in the sums at the top."
"""What a list of rewrites needs that says more together than the summary."""


def summary(explanation: Explanation) -> str:
    """What came out, in two to five sentences."""
    before, after = explanation.before, explanation.after
    shown = after or before
    time, was = human_us(shown.end_to_end_us), human_us(before.end_to_end_us)
    speedup = f"{before.end_to_end_us / after.end_to_end_us:.2f}x" if after and after.end_to_end_us else ""
    if shown.predicted:
        said = f"{explanation.model} would take about {was} a call on {shown.device}"
        said += f", and {time} with what can be fused, {speedup} as fast" if speedup else ""
        said += ", by the costs of its ops alone"
    elif shown.version == NOT_IN_USE:
        said = f"{explanation.model} takes {was} a call on {shown.device}, and stays as it was: "
        said += f"optimized it takes {time}"
    else:
        said = f"{explanation.model} takes {time} a call on {shown.device}"
        said += f", {speedup} as fast as before ({was})" if speedup else ""
    share = digest.percent(shown.floor_us, shown.end_to_end_us)
    sentences = [f"{said}. Its ops as they are need at least {human_us(shown.floor_us)} there ({share})."]
    if shown.unattributed_us > shown.end_to_end_us / 2:
        share = digest.percent(shown.unattributed_us, shown.end_to_end_us)
        sentences.append(f"For {share} of the call no op runs: {meanwhile(shown)}.")
    if after is None:
        sentences += _savings(explanation)
    return " ".join(sentences)


def meanwhile(profile: Profile) -> str:
    """What goes on while no op runs: of the unattributed time."""
    return "the device waits for the host" if profile.cuda else "Python does, between the ops"


def unattributed_to(profile: Profile) -> str:
    """The same for a cell of a table."""
    return "the host, not an op" if profile.cuda else "Python between the ops"


def _savings(explanation: Explanation) -> list[str]:
    """What could be saved, and what a call would take then; empty where that is nothing."""
    captured = digest.capturing_us(explanation.opportunities)
    fused = digest.together_us(explanation.opportunities)
    of_fusing = f"{human_us(fused)}, {fusing_share(explanation)}."
    left = f"about {human_us(digest.left_us(explanation))} a call, {times_as_fast(explanation)}."
    if captured and fused:
        said = f"Capturing its launches once as a CUDA graph would save about {human_us(captured)}"
        return [f"{said}, fusing what can be fused {of_fusing}", f"Together: {left}"]
    if captured:
        said = f"Capturing its launches once as a CUDA graph would save about {human_us(captured)}."
        return [said, f"That leaves {left}"]
    return [f"Fusing what can be fused would save about {of_fusing}", f"That leaves {left}"] if fused else []


def times_as_fast(explanation: Explanation) -> str:
    """ "21x as fast": a call once captured and fused, beside one as it was."""
    faster = explanation.before.end_to_end_us / (digest.left_us(explanation) or 1.0)
    return f"{faster:.0f}x as fast" if faster >= 9.95 else f"{faster:.1f}x as fast"


def fusing_share(explanation: Explanation) -> str:
    """ "7.3% of the call and 61% of what the ops take"."""
    fused = digest.together_us(explanation.opportunities)
    of_call = digest.percent(fused, explanation.before.end_to_end_us)
    of_ops = digest.percent(fused, explanation.before.attributed_us)
    return f"{of_call} of the call" + (f" and {of_ops} of what the ops take" if of_ops != of_call else "")


def counts_once(explanation: Explanation) -> bool:
    """Whether the summary tells of rewrites that together save less than their list says."""
    listed = [each for each in digest.possible(explanation.opportunities) if each.rewrite != CUDA_GRAPH]
    return explanation.after is None and len(digest.counted_once(listed)) < len(listed)


def how(explanation: Explanation) -> str:
    """How to get what can be had, with the code in backticks; empty where it was done, or where there is nothing."""
    if digest.is_done(explanation) or not digest.possible(explanation.opportunities):
        return ""
    own = ", rewrites=[...]" if explanation.rewrites else ""
    does = f"`fast = burnish.optimize(model{own})` does all of this"
    return f"{does}." if explanation.before.predicted else f"{does}; `fast.report(args)` measures it."


def conditions(explanation: Explanation) -> str:
    """What the times are of: the dtype of the weights, torch's version, how many calls; what is known of it."""
    shown = explanation.after or explanation.before
    weights = f"{explanation.dtype} weights" if explanation.dtype else ""
    torch = f"torch {explanation.torch}" if explanation.torch else ""
    timed = f"time of a call: mean of the fastest third of {shown.calls} calls" if shown.calls else ""
    return ", ".join(filter(None, (weights, torch, timed)))
