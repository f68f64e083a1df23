"""`lens rl`: prompt sets, audits and estimates from the command line, errors in one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lens_llm.prompts import read
from lens_llm.recipe_audit import sampled
from test_llm_client import KEY, Endpoint, endpoint, fault  # noqa: F401  # one is a fixture

from lens_core.cli.main import main
from lens_core.types import ConfigError, Prompt

AUDIT = """
pipeline: {{start: "tiny:"}}
method:
  use: diffusion_nft
  prompts: {{use: shapes, split: train, prompts: 40}}
  rewards: [{reward}]
  prompts_per_rollout: 2
  pictures_per_prompt: 2
  rollout_steps: 2
train: {{steps: 1}}
"""


def test_a_set_about_shapes_needs_no_language_model_and_is_the_same_each_time(tmp_path: Path, capsys):
    out = tmp_path / "set.jsonl"
    assert main(["rl", "prompts", "--shapes", "40", "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 40 prompts\n"
    prompts = read(out, rubrics=None, similarity_threshold=None)
    assert [p.data["split"] for p in prompts].count("eval") == 4
    texts = {p.text for p in prompts}
    assert len(texts) == 40 and len({p.id for p in prompts}) == 40
    assert all(r["check"]["op"] for p in prompts for r in (*p.data["rubrics"], p.data["global"]))
    again = tmp_path / "again.jsonl"
    assert main(["rl", "prompts", "--shapes", "40", "--output", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_set_is_written_through_an_endpoint(tmp_path: Path, capsys, endpoint: Endpoint):  # noqa: F811
    def reply(body: dict[str, Any]) -> str:
        question = json.loads(body["messages"][-1]["content"] if isinstance(body["messages"][-1]["content"], str)
                           else body["messages"][-1]["content"][0]["text"])  # fmt: skip
        if "item" in question:
            return json.dumps({"prompt": f"a {question['item']} in the rain"})
        return json.dumps(
            {"rubrics": [{"kind": "counting", "q": f"Is fact {i} there?"} for i in range(question["how_many"])]}
        )

    endpoint.reply = reply
    plan = tmp_path / "taxonomy.yaml"
    plan.write_text(
        f"llm: {{use: openai, model: m, base_url: '{endpoint.url}', key_env: LENS_TEST_KEY}}\n"
        "license: CC0\nclasses: {animal: {bird: [parrot, heron]}}\n"
    )
    out = tmp_path / "set.jsonl"
    assert main(["rl", "prompts", str(plan), "--output", str(out)]) == 0
    assert sorted(p.text for p in read(out)) == ["a heron in the rain", "a parrot in the rain"]
    assert "sk-secret" not in capsys.readouterr().out + out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompts", "--output", "x.jsonl"], "give a taxonomy file, or --shapes N"),
        (["prompts", "t.yaml", "--shapes", "9", "--output", "x.jsonl"], "and not both"),
        (["prompts", "--shapes", "1", "--output", "x.jsonl"], "2 at least"),
        (["prompts", "--shapes", "9", "--output", "no/x.jsonl"], "there is no folder"),
        (["prompts", "no.yaml", "--output", "x.jsonl"], "no.yaml: cannot be read"),
        (["estimate", "fit.yaml"], "has no rewards; use `diffusion_nft`"),
        (["audit", "fit.yaml", "--num-images", "1"], "--num-images must be at least 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("fit.yaml").write_text("method: flow_matching\ndataset: shapes\ntrain: {steps: 1}\n")
    assert main(["rl", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["fit.yaml"]


def test_an_audit_tells_that_an_exact_judge_never_flips_and_agrees_with_itself(tmp_path: Path, capsys):
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(AUDIT.format(reward="{use: shapes_rubrics, fallback: {use: shapes_rubrics}}"))
    assert main(["rl", "audit", str(recipe), "--num-images", "6"]) == 0
    (report,) = json.loads(capsys.readouterr().out).values()
    assert report["pictures"] == 6 and report["noise"] == 0
    assert set(report["flips"].values()) == {0.0} and set(report["agreement"].values()) == {1.0}
    assert report["probes"].keys() == {"blank", "noise", "swapped"} and report["probes"]["blank"] < 0.9


def test_an_audit_samples_the_prompts_of_the_recipes_tasks_by_its_seed():
    prompts = [Prompt(f"p{i}", i, ("a", "b", "c")[i % 3]) for i in range(300)]
    one = sampled(prompts, ["a", "c"], 40, 7)
    assert len({p.id for p in one}) == 40 and {p.task for p in one} == {"a", "c"}
    assert one == sampled(prompts, ["a", "c"], 40, 7) and one != sampled(prompts, ["a", "c"], 40, 8)
    assert max(p.id for p in one) > 200 and [p.id for p in one] == sorted(p.id for p in one)
    counts = Counter(p.id for seed in range(300) for p in sampled(prompts, [], 30, seed))
    assert len(counts) == 300 and max(counts.values()) < 30 + 6 * 30**0.5  # each 30 times on average
    assert sampled(prompts, ["b"], 1000, 0) == [p for p in prompts if p.task == "b"]
    with pytest.raises(ConfigError, match="no task of the prompts is called 'bb'"):
        sampled(prompts, ["bb"], 4, 0)


def test_an_audit_asks_for_no_task_that_its_recipe_leaves_out(tmp_path: Path, capsys, monkeypatch):
    seen: list[Prompt] = []

    def audited(judge: Any, images: Any, prompts: Any, seed: int, auditor: Any) -> dict[str, Any]:
        seen.extend(prompts)
        return {}

    monkeypatch.setattr("lens_llm.audit.audit", audited)
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(AUDIT.format(reward="shapes_rubrics").replace("train: {", "  tasks: [counting]\ntrain: {"))
    assert main(["rl", "audit", str(recipe), "--num-images", "4"]) == 0
    assert len(seen) == 4 and {p.task for p in seen} == {"counting"}


def test_an_estimate_is_printed(capsys):
    recipe = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "tiny" / "4_rl_nft.yaml"
    assert main(["rl", "estimate", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "scored pictures" in printed and "backbone: old policy" in printed and "lens_shapes:shapes" in printed


def test_an_audit_of_one_prompt_is_refused_before_anything_is_drawn(tmp_path: Path, capsys):
    (tmp_path / "one.txt").write_text("a red circle\n")
    recipe = tmp_path / "audit.yaml"
    text = AUDIT.format(reward="shapes_rubrics").replace(
        "use: shapes, split: train, prompts: 40", "use: prompts, path: P"
    )
    recipe.write_text(text.replace("path: P", f"path: '{tmp_path / 'one.txt'}'"))
    assert main(["rl", "audit", str(recipe)]) == 2
    assert "two different prompts at least" in capsys.readouterr().err


@pytest.mark.parametrize("debug", ["", "1"])
@pytest.mark.parametrize("key", [f"{KEY}\n", "sk-secret\n0123456789"])
def test_no_output_of_the_command_line_shows_the_key(
    tmp_path: Path, capfd, endpoint: Endpoint, monkeypatch, debug, key  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("LENS_DEBUG", debug)
    monkeypatch.setenv("LENS_TEST_KEY", key)
    endpoint.script = [fault(401, f"{KEY} {key!r} is wrong")] * 20
    llm = f"{{use: openai, model: m, base_url: '{endpoint.url}', key_env: LENS_TEST_KEY}}"
    plan = tmp_path / "taxonomy.yaml"
    plan.write_text(f"llm: {llm}\nlicense: CC0\nclasses: {{animal: {{bird: [parrot, heron]}}}}\n")
    assert main(["rl", "prompts", str(plan), "--output", str(tmp_path / "set.jsonl")]) == 2
    output = "".join(capfd.readouterr()) + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "could not be written" in output and "sk-secret" not in output and "0123456789" not in output
    plan.write_text(plan.read_text().replace("LENS_TEST_KEY", "sk_secret_0123456789"))
    assert main(["rl", "prompts", str(plan), "--output", str(tmp_path / "set.jsonl")]) == 2
    output = "".join(capfd.readouterr())
    assert "key_env must be the name" in output and "sk_secret" not in output
