"""An Explanation as one HTML page that needs nothing else: no network, and no script or style but its own.

What a model, a file or a kernel is called is somebody else's text: every name is escaped by the template, and the
page's Content-Security-Policy names its one script and its one style sheet by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from burnish._text import human_us
from burnish.report import charts, digest, pictures, sentences
from burnish.report.blocked import blocked
from burnish.report.data import Block, Explanation, OpRow, Profile

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TOP = 3  # how many costs and rewrites stand at the head of the page
_MOST_ROWS, _MOST_NODES, _MOST_SPANS, _MOST_CODE = 500, 400, 600, 400_000  # together they keep a page under 3 MB


@dataclass(frozen=True)
class _Op:
    """A row of a table of ops."""

    id: str
    block: Block
    row: OpRow

    @property
    def where(self) -> str:
        return digest.row_name(self.block, self.row)

    @property
    def us(self) -> float:
        return self.row.shown_us * self.block.count

    @property
    def launches(self) -> int:
        return digest.launches(self.row)


@dataclass(frozen=True)
class _Cost:
    """A part at the head of the page; `row` is the id of its costliest op."""

    part: digest.Part
    row: str


@dataclass(frozen=True)
class _Version:
    """What the page tells of one profile. rest: the ops that a table does not list, because they are too many."""

    profile: Profile
    key: str
    costs: tuple[_Cost, ...]
    ops: tuple[_Op, ...]
    rest: tuple[_Op, ...]

    @property
    def others(self) -> list[digest.Part]:
        return digest.parts(self.profile)[len(self.costs) :]


def render(explanation: Explanation) -> str:
    """The page's whole text, to be written as UTF-8."""
    style, script = _file("report.css"), _file("report.js")
    versions = [_version(explanation.before, "before")]
    if explanation.after:
        versions.append(_version(explanation.after, "after"))
    shown = versions[-1]
    unit = digest.unit_of(explanation)
    listed = {op.id for version in versions for op in version.ops}
    numbers = {cost.row: place for place, cost in enumerate(shown.costs, start=1) if cost.row}
    lines = digest.lines(explanation)
    longest = max((sum_.us for line in lines for sum_ in (line.before, line.after) if sum_), default=0.0) or 1.0
    template = _environment().get_template("report.html.j2")
    own = f"style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; {own}"
    return template.render(
        explanation=explanation,
        before=explanation.before,
        after=explanation.after,
        done=digest.is_done(explanation),
        summary=sentences.summary(explanation),
        how=sentences.how(explanation),
        conditions=sentences.conditions(explanation),
        left_us=digest.left_us(explanation),
        times_as_fast=sentences.times_as_fast(explanation),
        fusing_share=sentences.fusing_share(explanation),
        counted_once=sentences.COUNTED_ONCE if sentences.counts_once(explanation) else "",
        gaps=sentences.GAPS,
        meanwhile=sentences.meanwhile,
        versions=versions,
        shown=shown,
        unit=lambda us, more=0: _minus(unit(us, more)),
        unit_name="\N{MICRO SIGN}s" if unit.name == "us" else unit.name,
        places=digest.places(explanation),
        makes=digest.makes(explanation),
        lines=lines,
        longest=longest,
        possible=digest.possible(explanation.opportunities),
        blocked=blocked(explanation),
        capturing_us=digest.capturing_us(explanation.opportunities),
        together_us=digest.together_us(explanation.opportunities),
        top=_TOP,
        roofline=charts.roofline(explanation, listed, numbers),
        timeline=charts.timeline(explanation, listed) if len(explanation.timeline) <= _MOST_SPANS else None,
        drawings=_drawings(explanation, versions),
        groups=pictures.group_colours(explanation.pictures),
        code=explanation.code[:_MOST_CODE],
        code_is_cut=len(explanation.code) > _MOST_CODE,
        style=style,
        script=script,
        policy=policy,
    )


def _version(profile: Profile, key: str) -> _Version:
    ops = [_Op(*each) for each in charts.identified(profile, key == "after")]
    ops.sort(key=lambda op: -op.us)
    costs = []
    for part in digest.parts(profile)[:_TOP]:
        rows = {id(row) for row in part.rows}
        costs.append(_Cost(part, next((op.id for op in ops if id(op.row) in rows), "")))  # ops come costliest first
    return _Version(profile, key, tuple(costs), tuple(ops[:_MOST_ROWS]), tuple(ops[_MOST_ROWS:]))


def _drawings(explanation: Explanation, versions: list[_Version]) -> list[pictures.Drawing]:
    """The first picture is of the model as it was, those after it are of the last version."""
    colours = pictures.group_colours(explanation.pictures)
    found = []
    for place, picture in enumerate(explanation.pictures):
        if len(picture.nodes) > _MOST_NODES:
            continue
        version = versions[0] if place == 0 else versions[-1]
        found.append(pictures.draw(picture, colours, {op.row.name: op.id for op in reversed(version.ops)}))
    return found


def _file(name: str) -> str:
    return resources.files("burnish.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("burnish.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        op=digest.op_name,
        kernel=digest.kernel_name,
        shape=digest.short_shape,
        human=lambda value: _units(human_us(value)),
        less=_less,
        units=_units,
        breaks=_breaks,
        code=_code,
    )
    environment.globals.update(
        percent=lambda part, whole: _minus(digest.percent(part, whole)),
        share_of_floor=digest.share_of_floor,
        saving_us=digest.saving_us,
    )
    return environment


def _units(text: str) -> str:
    """The signs that a page can show and a terminal perhaps not: a micro sign, a times sign."""
    return re.sub(r"(?<=\d)x(?= )", "\N{MULTIPLICATION SIGN}", re.sub(r"(?<=\d )us\b", "\N{MICRO SIGN}s", text))


def _less(us: float) -> str:
    """What was saved, as a difference: "-4.2 us", with a sign that is as wide as the plus of what was lost."""
    return f"{'+' if us < 0 else _minus('-')}{_units(human_us(abs(us)))}"


def _minus(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _code(text: str) -> Markup:
    """What stands in backticks as code; escaped."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def _breaks(name: str) -> Markup:
    """A name that may break after its dots, or where it has none after its underscores; escaped."""
    from markupsafe import Markup

    ends = r"(?<=\.)(?=\w)" if "." in name else r"(?<=_)(?=\w)"
    return Markup("<wbr>").join(re.split(ends, name))  # which escapes what it joins
