"""`san trace`: what it prints and writes, in every form."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from tests.bench.graphs import DRAWN, HOSTILE, traced
from tests.golden.models import GROUPED, IMAGE, TEXT

from san_bench.cli import main
from san_bench.graph.command import FORMS, to_dot, to_text, to_tree
from san_bench.graph.fold import fold_blocks
from san_bench.graph.wording import summary
from san_peft import PropagationGraph, trace


@pytest.fixture
def vit(tmp_path) -> Path:
    """Folder with the configuration of a tiny ViT."""
    folder = tmp_path / "tiny-vit"
    config = transformers.ViTConfig(**IMAGE, num_labels=2, architectures=["ViTForImageClassification"])
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    """Folder with the configuration of a tiny Llama."""
    folder = tmp_path / "tiny-llama"
    transformers.LlamaConfig(**{**TEXT, **GROUPED}).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ the command


def test_json_is_the_graph_and_nothing_else(vit, capsys):
    main(["trace", str(vit), "--json"])
    printed = capsys.readouterr()
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=2))
    assert PropagationGraph.from_json(printed.out) == trace(model).select("all")
    assert printed.err == ""


@pytest.mark.parametrize("scheme", ["exact", "feedforward", "reference", "none"])
def test_json_of_a_scheme(vit, scheme, capsys):
    main(["trace", str(vit), "--json", "--scheme", scheme])
    graph = PropagationGraph.from_json(capsys.readouterr().out)
    whole = trace(transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, num_labels=2)))
    assert graph == whole.select(scheme)


def test_tree_of_the_embedded_model(capsys):
    main(["trace", "embedded"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "embedded (ViTModel), scheme all"
    assert lines[1] == "25 edges: 4 exact, 4 activation, 17 residual; 26 layers; 0 barriers; no head"
    assert "layers.0 .. 3 (x4)" in lines
    assert "│   └── -> mlp.fc2  [identity]  activation  through gelu  x4" in lines
    assert "    └── -> pooler.dense  [identity]  residual  through residual, layer_norm  from block 3" in lines


@pytest.mark.parametrize("form", ["json", "dot", "svg", "html"])
def test_a_file_holds_what_is_printed_without_it(llama, form, tmp_path, capsys):
    main(["trace", str(llama), f"--{form}"])
    printed = capsys.readouterr().out
    target = tmp_path / "new" / "folder" / f"graph.{form}"
    main(["trace", str(llama), f"--{form}", "--out", str(target)])
    assert target.read_text(encoding="utf-8") == printed
    assert capsys.readouterr().out == f"{target}\n"
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_a_tree_goes_to_a_file_as_well_and_replaces_what_was_there(llama, tmp_path, capsys):
    target = tmp_path / "graph.txt"
    target.write_text("old", encoding="utf-8")
    main(["trace", str(llama), "--out", str(target)])
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_text(encoding="utf-8").startswith("tiny-llama (LlamaForCausalLM), scheme all\n")


def test_a_title_names_no_place_on_this_machine(llama, tmp_path, capsys):
    for form in ("--dot", "--svg", "--html"):
        main(["trace", str(llama), form])
        text = capsys.readouterr().out
        assert "tiny-llama (LlamaForCausalLM)" in text
        assert str(tmp_path) not in text


def failure(capsys, *words: str) -> str:
    """Runs `san trace`, which has to fail with one line and exit code 2, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main(["trace", *words])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


def test_an_unknown_name_suggests_known_ones_and_writes_nothing(tmp_path, capsys):
    target = tmp_path / "graph.svg"
    assert "Did you mean llama" in failure(capsys, "lama", "--svg", "--out", str(target))
    assert not target.exists()


def test_a_hub_id_without_a_connection(capsys):
    assert "HF_HUB_OFFLINE" in failure(capsys, "nobody/nothing")


def test_two_forms_at_once(capsys):
    line = failure(capsys, "gpt2", "--json", "--svg")
    assert "--json, --dot, --svg, --html and --placement; 2" in line


def test_where_each_scale_acts(llama, capsys):
    main(["trace", str(llama), "--placement"])
    lines = capsys.readouterr().out.splitlines()
    ends = {line.split(" @ ")[1] for line in lines if " @ " in line}
    assert {"output", "norm model.layers.0.post_attention_layernorm"} <= ends


def test_the_reference_scheme_needs_a_patch_embedding(llama, capsys):
    line = failure(capsys, str(llama), "--scheme", "reference")
    assert "patch embedding" in line
    assert "'reference'" in line
    assert "'feedforward'" in line


@pytest.mark.parametrize("name", ["embedded", "wav2vec2"])
def test_threads_are_as_before(name):
    before = torch.get_num_threads()
    with contextlib.suppress(SystemExit):
        main(["trace", name, "--json"])
    assert torch.get_num_threads() == before


def test_a_model_that_cannot_be_traced_says_how_else(capsys):
    assert "san_peft.trace(model, example_inputs)" in failure(capsys, "wav2vec2", "--json")


def test_out_may_not_be_a_folder(llama, tmp_path, capsys):
    assert "is a folder" in failure(capsys, str(llama), "--out", str(tmp_path))


def test_a_write_that_fails_leaves_the_old_file(llama, tmp_path, capsys, monkeypatch):
    target = tmp_path / "graph.json"
    target.write_text("old", encoding="utf-8")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "graph.json cannot be written: No space left on device" in failure(
        capsys, str(llama), "--json", "--out", str(target)
    )
    assert target.read_text(encoding="utf-8") == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"graph.json", "tiny-llama"}


# ------------------------------------------------------------------ the tree


@pytest.mark.parametrize("name", DRAWN)
def test_the_tree_names_every_folded_edge_and_barrier(name):
    graph = traced(name)
    text, folded = to_text(graph, "title"), fold_blocks(graph)
    assert text.splitlines()[:2] == ["title", summary(graph)]
    assert text.count("-> ") == len(folded.edges) + len(folded.layers)  # a layer's sizes have an arrow too
    arrows = [line for line in text.splitlines() if re.search(r"[├└]── -> ", line)]
    assert sum(int(n[1]) if (n := re.search(r"  x(\d+)", line)) else 1 for line in arrows) == len(graph.edges)
    assert all(barrier.reason in text for barrier in graph.barriers)
    assert text.count("  head") == len(graph.heads)


def test_the_tree_keeps_to_the_width_of_a_terminal(capsys):
    console = Console(width=60, force_terminal=True, color_system="standard", highlight=False, no_color=False)
    console.print(to_tree(traced("whisper"), "a title"))
    printed = capsys.readouterr().out
    assert "\x1b[35mresidual" in printed
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in printed.splitlines()) <= 60


@pytest.mark.parametrize("colour", [False, True])
def test_no_colour_where_none_is_wanted(llama, colour, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    main(["trace", str(llama)])
    assert bool(re.search(r"\x1b\[[\d;]*3[1-7]m", capsys.readouterr().out)) is colour


def test_no_codes_at_all_in_a_pipe(llama, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    main(["trace", str(llama)])
    assert "\x1b" not in capsys.readouterr().out


def test_counts_have_their_words():
    assert summary(PropagationGraph()) == "0 edges; 0 layers; 0 barriers; no head"
    assert summary(traced("llama")).endswith("0 barriers; head lm_head")
    assert summary(traced("timm-deit")).endswith("heads head, head_dist")


# ------------------------------------------------------------------ Graphviz


DOT_STRING = r'"(?:[^"\\]|\\.)*"'


def dot_statements(text: str) -> list[str]:
    """Statements of a DOT text whose strings are whole and whose brackets match; strings as `@0`, `@1`, ..."""
    bare = re.sub(DOT_STRING, "@", text)
    assert '"' not in bare, "a string does not end"
    for pair in ("{}", "[]"):
        assert bare.count(pair[0]) == bare.count(pair[1])
    return re.findall(r"[^;{}]+", bare)


@pytest.mark.parametrize("name", DRAWN)
def test_dot_has_a_node_per_layer_and_an_arrow_per_edge(name):
    graph = traced(name)
    folded, text = fold_blocks(graph), to_dot(graph, "title")
    dot_statements(text)
    nodes = re.findall(rf"^ +({DOT_STRING}) \[label", text, re.M)
    assert nodes == [f'"{layer.name}"' for layer in folded.layers]
    arrows = re.findall(rf"^  ({DOT_STRING}) -> ({DOT_STRING}) \[label=({DOT_STRING})", text, re.M)
    assert [(a, b) for a, b, _ in arrows] == [(f'"{e.anterior.name}"', f'"{e.posterior.name}"') for e in folded.edges]
    assert sum(int(n[1]) if (n := re.search(r"\\nx(\d+)\"", words)) else 1 for _, _, words in arrows) == len(
        graph.edges
    )
    assert text.count("subgraph cluster_") == sum(bool(block.name) for block in folded.blocks)
    assert text.count("shape=note") == len(folded.barriers)


def test_dot_quotes_what_would_break_it():
    text = to_dot(HOSTILE, 'a "title"\\')
    dot_statements(text)
    assert r'label="a \"title\"\\\n' in text


def test_an_empty_graph_can_be_drawn():
    for write in FORMS.values():
        assert write(PropagationGraph(), "nothing")
