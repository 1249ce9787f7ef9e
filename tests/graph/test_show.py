"""A graph as text and as a picture."""

from __future__ import annotations

import builtins
import re
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn, randn

from burnish.graph import draw, find_matches, graph_report, replace_pattern, trace

SVG = "{http://www.w3.org/2000/svg}"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.param = nn.Parameter(torch.rand(3, 4))
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.param).clamp(min=0.0, max=1.0)


def test_report_lists_nodes_and_modules():
    report = graph_report(trace(Model()))
    assert [(r.opcode, r.name, r.args, r.kwargs) for r in report.nodes] == [
        ("placeholder", "x", "", ""),
        ("get_attr", "param", "", ""),
        ("call_function", "add", "(x, param)", ""),
        ("call_module", "linear", "(add,)", ""),
        ("call_method", "clamp", "(linear,)", "min=0.0, max=1.0"),
        ("output", "output", "(clamp,)", ""),
    ]
    assert report.nodes[2].target == "operator.add"
    text = str(report)
    assert "Used modules" in text
    assert "Linear(in_features=4, out_features=5, bias=True)" in text
    assert "\x1b" not in text


def test_report_shows_shapes_where_they_are_known():
    text = str(graph_report(trace(Model(), (randn(3, 4),))))
    assert "float32[3, 5]" in text
    assert "aten.linear.default" in text
    assert "Used modules" not in text


def test_report_prints_what_looks_like_markup():
    graph = fx.Graph()
    graph.output(graph.call_function(torch.full, ((2,), 1.0), {"dtype": torch.float32}))
    text = str(graph_report(fx.GraphModule(nn.Module(), graph)))
    assert "dtype=torch.float32" in text
    graph = fx.Graph()
    graph.output(graph.call_function(print, ("[bold]loud[/bold]",)))
    assert "[bold]loud[/bold]" in str(graph_report(fx.GraphModule(nn.Module(), graph)))


def texts(path):
    root = ElementTree.parse(path).getroot()
    return ["".join(t.itertext()) for t in root.iter(f"{SVG}text")]


def boxes(path):
    """Title -> (left, top, right, bottom, fill) of every box."""
    found = {}
    for group in ElementTree.parse(path).getroot().iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        if rect is not None and group.find(f"{SVG}title") is not None:
            x, y, w, h = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
            found[group.find(f"{SVG}title").text.split(":")[0]] = (x, y, x + w, y + h, rect.get("fill"), text.text)
    return found


def diamond(x, y):
    a = F.relu(x)
    return torch.sigmoid(a) * torch.tanh(a) + y


def test_draw_places_every_node_once_and_apart(tmp_path):
    gm = trace(diamond, (randn(2, 3), randn(2, 3)))
    path = draw(gm, tmp_path / "g.svg")
    assert path == tmp_path / "g.svg"
    placed = boxes(path)
    assert set(placed) == {n.name for n in gm.graph.nodes}
    rectangles = list(placed.values())
    for i, a in enumerate(rectangles):
        for b in rectangles[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            assert placed[source.name][3] < placed[node.name][1]
    edges = sum(len(n.all_input_nodes) for n in gm.graph.nodes)
    assert len(re.findall(r'<path d="M[^"]*" marker-end="url\(#arrow\)"/>', path.read_text())) == edges


def test_draw_highlights_matches(tmp_path):
    gm = trace(lambda x: (F.relu(x) * 2).neg().relu() * 2)
    matches = find_matches(gm, lambda x: F.relu(x) * 2)
    path = draw(gm, str(tmp_path / "g.svg"), highlight=matches)
    fills = {name: box[4] for name, box in boxes(path).items()}
    assert fills["relu"] == fills["mul"] != fills["relu_1"] == fills["mul_1"]
    assert len({fills["neg"], fills["relu"], fills["relu_1"]}) == 3
    assert [t for t in texts(path) if "(2 nodes)" in t] == ["<lambda> at mul (2 nodes)", "<lambda> at mul_1 (2 nodes)"]


def test_draw_refuses_matches_of_another_graph(tmp_path):
    gm = trace(lambda x: F.relu(x) * 2)
    matches = replace_pattern(gm, lambda x: F.relu(x), lambda x: torch.tanh(x))
    with pytest.raises(ValueError, match="relu of the match at relu is not in this graph; draw before replacing"):
        draw(gm, tmp_path / "g.svg", highlight=matches)
    assert not (tmp_path / "g.svg").exists()


def test_draw_escapes_names(tmp_path):
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, 1), {"alpha": '<&">'}))
    path = draw(fx.GraphModule(nn.Module(), graph), tmp_path / "g.svg")
    assert any('<&">' in t for t in texts(path))


def test_draw_folds_weights_and_sizes_into_their_users(tmp_path):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).view(x.shape[0], x.shape[1], 2, 4)

    auto = torch.export.Dim.AUTO
    gm = torch.export.export(Heads(), (randn(2, 3, 8),), strict=False, dynamic_shapes=({0: auto, 1: auto},)).module()
    path = draw(gm, tmp_path / "g.svg")
    assert {"proj_weight", "sym_size_int"}.isdisjoint(boxes(path))
    assert "proj.weight" in texts(path)


def test_draw_without_igraph_writes_dot(tmp_path, monkeypatch):
    def no_igraph(name, *args, real=builtins.__import__, **kwargs):
        if name == "igraph":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_igraph)
    path = draw(trace(diamond), tmp_path / "g.svg")
    assert path == tmp_path / "g.dot"
    text = path.read_text()
    assert text.startswith("digraph {")
    assert text.count("->") == 8
    assert 'label="sigmoid' in text
