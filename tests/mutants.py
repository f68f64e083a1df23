"""Break one line of the science at a time and ask the tests that should see it: `make mutants`.

`python tests/mutants.py [WORD ...]` tries those whose file or new text holds one of the words, or all.
A mutant is applied to a temporary copy of the tree, never to the tree itself. Exit 1 where one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("lens_core", "plugins", "tests", "examples", "docs", "pyproject.toml", "README.md")


class Mutant(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; one of the `tests`, pytest's arguments, must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Mutants of one file with the same tests; `+` in an expression for `-k` is `or`."""
    arguments = tuple(word.replace("+", " or ") for word in tests.split())
    return [Mutant(file, old, new, arguments) for old, new in changes]


MUTANTS = [
    # the loop
    *_of(
        "lens_core/training/step.py",
        "tests/core/test_trainer.py -k is_the_mean_over_its_parts",
        ("share = 1 / (len(micro) * state.ranks.micro_batches) if", "share = 1 / state.ranks.micro_batches if"),
        ("share = 1 / (len(micro) * state.ranks.micro_batches) if", "share = 1 / len(micro) if"),
    ),
    *_of(
        "lens_core/training/step.py",
        "tests/core/test_trainer.py -k dropout+different_noise",
        ("        torch.manual_seed(seed)  # dropout draws there\n", ""),
        (
            "seed = seed_of(state.recipe.seed, state.step, turn, part)",
            "seed = seed_of(state.recipe.seed, state.step, turn)",
        ),
        (
            "seed = seed_of(state.recipe.seed, state.step, turn, part)",
            "seed = seed_of(state.recipe.seed, state.step, part)",
        ),
    ),
    *_of(
        "lens_core/training/step.py",
        "tests/core/test_trainer.py -k gradients_of_the_one_before+bring_a_weight",
        ("    optimizer.zero_grad(set_to_none=True)\n", ""),
        ("                held /= weight\n", "                held *= 1.0\n"),
    ),
    *_of(
        "lens_core/training/step.py",
        "tests/core/test_trainer.py -k closed_form+the_rate+its_own_learning_rate",
        ("min(1.0, (step + 1) / train.warmup)", "min(1.0, step / train.warmup)"),
        ("start = train.steps * (1 - train.lr_decay_fraction)", "start = train.steps * train.lr_decay_fraction"),
        ("(1 - math.cos(math.pi * left)) / 2)", "(1 + math.cos(math.pi * left)) / 2)"),
        ("config.lr * config.lr_multipliers.get(module_name, 1.0) * lr_factor", "config.lr * lr_factor"),
    ),
    *_of(
        "lens_core/training/ema.py",
        "tests/core/test_trainer.py -k closed_form",
        ("return min(limit, (1 + step) / (10 + step))", "return limit"),
        (
            "value.detach().to(average[name].dtype), 1 - decay)",
            "value.detach().to(average[name].dtype), decay)",
        ),
    ),
    *_of(
        "lens_core/training/trainer.py",
        "tests/core/test_trainer.py -k not_finite+without_a_finite_loss",
        (
            "            refuse_non_finite(self)\n            if self.ranks.rank == 0 or",
            "            if self.ranks.rank == 0 or",
        ),
        ("if not any(self.spike_detector.row.values()):", "if True:"),
        ("        refuse_unproven(self)\n", ""),
    ),
    *_of(
        "lens_core/training/optimizers.py",
        "tests/core/test_evaluator.py -k last_evaluation",
        ("    torch.autograd.graph.increment_version(", "    list("),
    ),
    # DiffusionNFT
    *_of(
        "plugins/lens_nft/method.py",
        "tests/plugins/test_nft_method.py",
        ("self.config.old_policy_decay(step + 1)", "self.config.old_policy_decay(step)"),
        ("steps - self.old_policy_wait), self.old_policy_max_decay)", "steps), self.old_policy_max_decay)"),
        (
            "standard_deviations([part for other in all_gather(local) for part in other])",
            "standard_deviations(local[:1])",
        ),
        ("total = total + config.kl * parts", "total = total - config.kl * parts"),
    ),
    *_of(
        "plugins/lens_nft/policies.py",
        "tests/plugins/test_nft_method.py",
        ("value.lerp_(fresh[name].to(value.dtype), 1 - decay)", "value.lerp_(fresh[name].to(value.dtype), decay)"),
    ),
    *_of(
        "plugins/lens_nft/micro_batches.py",
        "tests/plugins/test_nft_method.py",
        ("len(blocks) * config.timesteps_per_image / mean_count", "1 / mean_count"),
        ("for p, q, s, learn in rows if learn)", "for p, q, s, learn in rows)"),
        ("(batch.interval + torch.rand((), generator=rng)) / intervals", "torch.rand((), generator=rng)"),
    ),
    *_of(
        "plugins/lens_nft/objective.py",
        "tests/plugins/test_nft_objective.py",
        ("(reward[here] - reward[here].mean())", "reward[here]"),
        ("0.5 + 0.5 * advantage.clamp", "0.5 + advantage.clamp"),
        ("bad = _error(old - d - target", "bad = _error(old + d - target"),
        ("clip * (r * good + (1 - r) * bad) / beta", "clip * (r * good + r * bad) / beta"),
        ("values.std(correction=0)", "values.std()"),
        ("t.square() * square / size.clamp", "t * square / size.clamp"),
    ),
    # DMD2
    *_of(
        "plugins/lens_dmd2/losses.py",
        "tests/plugins/test_dmd2_losses.py",
        ("(ahead - behind) / away", "(behind - ahead) / away"),
        (
            "gradient(x, x_t, t, guided, cond, cond, options.min_distance)",
            "gradient(x, x_t, t, cond, guided, cond, options.min_distance)",
        ),
        ("x_t, t, _ = noised(x, rng, options.schedule, until)", "x_t, t, _ = noised(x, rng, options.schedule)"),
        ("F.softplus(-real).mean() + F.softplus(fake)", "F.softplus(real).mean() + F.softplus(fake)"),
        ("(logits(x_t + sigma * n) - at) / sigma", "(logits(x_t + sigma * n) - at)"),
        ("[theirs[name] for name in mine], 1 - keep)", "[theirs[name] for name in mine], keep)"),
        ("middle = t + u * (after - t)", "middle = t + u * after"),
    ),
    *_of(
        "plugins/lens_dmd2/regression.py",
        "tests/plugins/test_dmd2_regression.py",
        ("by = (after - t) / count", "by = after - t"),
        ("at = flow.at(t + i * by, x)", "at = flow.at(t, x)"),
        ("return total / count", "return total"),
        ("flow.guide(v, unconditional(x, at), guidance)", "flow.guide(unconditional(x, at), v, guidance)"),
        ("config.steps, batch.number, rng)", "config.steps, 0, rng)"),
        ("for row, of in enumerate(step_of_row) if of == step]", "for row, of in enumerate(step_of_row)]"),
        ("counts[i] / ratios[i]", "counts[i]"),
    ),
    # flow, guidance, samplers
    *_of(
        "lens_core/flow.py",
        "tests/plugins/test_flow_matching.py tests/plugins/test_dmd2_losses.py tests/core/test_pipeline.py",
        ("return (1 - t) * data + t * noise", "return t * data + (1 - t) * noise"),
        ("return noise - data", "return data - noise"),
        ("uncond + scale * (cond - uncond)", "cond + scale * (cond - uncond)"),
        ("ratio = cond.norm(dim=1, keepdim=True)", "ratio = uncond.norm(dim=1, keepdim=True)"),
    ),
    *_of(
        "plugins/lens_flow/matching.py",
        "tests/plugins/test_flow_matching.py",
        ("share * (self.max_shift - self.base_shift)", "share * self.max_shift"),
        ("text.known & ~dropped", "text.known & dropped"),
        ("(number + torch.rand(len(z), generator=rng)) / BINS", "torch.rand(len(z), generator=rng)"),
    ),
    *_of(
        "plugins/lens_flow/solvers.py",
        "tests/plugins/test_flow_solvers.py",
        ("aim = data + ratio / 2 *", "aim = data + ratio *"),
        ("at(velocity, x + by * v, after)) / 2", "at(velocity, x, after)) / 2"),
        ("kept = (1 - after) / (1 - down)", "kept = 1.0"),
    ),
    *_of(
        "plugins/lens_flow/euler.py",
        "tests/plugins/test_flow_euler.py",
        ("x = x + by * at(velocity, x, t)", "x = x - by * at(velocity, x, t)"),
        ("slope * steps + at_200 - 200 * slope", "slope * steps + at_200"),
    ),
    # LoRA, the VAE, the language model
    *_of(
        "lens_core/inference/lora.py",
        "tests/core/test_lora.py",
        ("lora_alpha=adapter.scale * adapter.rank", "lora_alpha=adapter.scale"),
    ),
    *_of(
        "lens_core/checkpoints/adapters.py",
        "tests/core/test_adapters.py",
        ("else self.alpha / self.rank", "else self.alpha"),
        (
            "torch.kron(_product(self.w1, dtype), _product(self.w2, dtype))",
            "torch.kron(_product(self.w2, dtype), _product(self.w1, dtype))",
        ),
        ("_product(self.w1, dtype) * _product(self.w2, dtype)", "_product(self.w1, dtype) + _product(self.w2, dtype)"),
        ("torch.linalg.vector_norm(whole,", "torch.linalg.vector_norm(before,"),
        ("return whole * stretch - before", "return whole * stretch"),
        ("else self.scale * self.bias", "else self.bias"),
    ),
    # GGUF
    *_of(
        "plugins/lens_gpt_oss/gguf.py",
        "tests/plugins/test_gpt_oss_gguf.py",
        ("codes[..., 0::2] | (codes[..., 1::2] << 4)", "codes[..., 1::2] | (codes[..., 0::2] << 4)"),
        ("torch.stack([first, second], dim=1)", "torch.stack([second, first], dim=1)"),
    ),
    *_of(
        "lens_core/checkpoints/gguf_types.py",
        "tests/core/test_gguf_files.py",
        ("scales[..., None] * codes", "codes"),
        ("b[:, :1].int() - 128", "b[:, :1].int() - 127"),
    ),
    *_of(
        "plugins/lens_flux2/vae.py",
        "tests/plugins/test_flux2_training.py tests/plugins/test_flux2_vae.py",
        ("return (z - self._per_channel(self.net.bn.running_mean)) / self._std()", "return z / self._std()"),
        ("weight = max(momentum, 1 / int(bn.num_batches_tracked))", "weight = momentum"),
        ("weight * (1 - weight) * gap**2", "0 * gap**2"),
    ),
    *_of(
        "plugins/lens_gpt_oss/training.py",
        "tests/plugins/test_gpt_oss_training.py",
        (", weight=float(counts.sum()))", ")"),
        ("counts = learned[:, first:]", "counts = torch.ones_like(learned[:, first:])"),
    ),
    # the backbone
    *_of(
        "plugins/lens_mmdit/rope.py",
        "tests/plugins/test_mmdit_model.py",
        ("rows = torch.arange(h, dtype=torch.float64) - (h - h // 2)", "rows = torch.arange(h, dtype=torch.float64)"),
        ("torch.float64) + max(h // 2, w // 2)", "torch.float64)"),
    ),
    *_of(
        "plugins/lens_mmdit/attention.py",
        "tests/plugins/test_mmdit_model.py",
        ("scores.masked_fill(~mask, -torch.inf)", "scores.masked_fill(mask, -torch.inf)"),
    ),
    # buckets
    *_of(
        "plugins/lens_data/buckets.py",
        "tests/plugins/test_data_buckets.py",
        ("scale = np.maximum(height / tall, width / wide)", "scale = np.minimum(height / tall, width / wide)"),
        ("far = np.abs(np.log(wide * height / (tall * width)))", "far = np.abs(wide * height / (tall * width))"),
    ),
    # money and keys of remote systems
    *_of(
        "plugins/lens_remote/ledger.py",
        "tests/plugins/test_remote_generator.py -k budget+twice+lost+exact+rate+stands",
        ("pictures + 1 > limits.pictures", "pictures > limits.pictures"),
        ("micro + next_micro > round", "micro > round"),
        ("now < last + limits.spacing", "now < last"),
        ("if before is not None and not (again and _is_over(before, now)):", "if before is not None and not again:"),
        ('_DECISIVE = ("drawn", "address", "refused", "sent", "lost")', '_DECISIVE = ("drawn", "address", "refused")'),
    ),
    *_of(
        "plugins/lens_remote/drawing.py",
        "tests/plugins/test_remote_generator.py tests/plugins/test_remote_misbehaviour.py",
        ("return self.config.resend_lost or not failure.lost", "return True"),
        ("pictures=count if billed else 0", "pictures=0"),
    ),
    *_of(
        "plugins/lens_remote/pictures.py",
        "tests/plugins/test_remote_generator.py -k address",
        ("http.get(url, {}, max", 'http.get(url, {"authorization": key}, max'),
        ("if flaw is None and holds(url, key):", "if False:"),
        (
            "        flaw = flaw_of_address(url, plain, key)\n        if flaw is not None:\n            return flaw\n",
            "",
        ),
    ),
    # the public benchmarks
    *_of(
        "plugins/lens_bench/geneval.py",
        "tests/plugins/test_bench_geneval.py",
        ("if scores[i] > threshold]", "if scores[i] >= threshold]"),
        ("np.argsort(scores)[::-1]", "np.argsort(-scores)"),
        ("< max_overlap for k in kept)", "<= max_overlap for k in kept)"),
        ("max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)", "max(x2 - x1, 0) * max(y2 - y1, 0)"),
        ("length / float(np.linalg.norm(offset))", "length / float(np.linalg.norm(beyond))"),
        ("dx < -0.5, dx > 0.5, dy", "dx <= -0.5, dx >= 0.5, dy"),
        ('metadata["tag"] == "counting"', 'metadata["tag"] == "count"'),
        ("number >= clause", "number > clause"),
        ("for other, number in target:", "for other, number in target[:1]:"),
    ),
    *_of(
        "plugins/lens_bench/text.py",
        "tests/plugins/test_bench_text.py",
        ("for form in (sentinel, f", "for form in (f"),
        ("right << 1 | 1, left << 1", "right << 1, left << 1"),
        ("(Counter(reference) & Counter(prediction))", "Counter(w for w in reference if w in set(prediction))"),
    ),
    *_of(
        "plugins/lens_bench/cvtg.py",
        "tests/plugins/test_bench_text.py",
        ("(max(len(a), len(b)) + 1e-5)", "max(len(a), len(b), 1)"),
        ("line.lower().split()]", "line.split()]"),
    ),
    *_of(
        "plugins/lens_bench/perceive/detection.py",
        "tests/plugins/test_bench_detection.py",
        ("inside = logits > 0\n", "inside = logits > -1\n"),
        ("[..., : fitted[0], : fitted[1]]", ""),
        (".softmax(-1)[:, :-1]", "[:, :-1].softmax(-1)"),
        ("int(columns[-1]) + 1, int(rows[-1]) + 1", "int(columns[-1]), int(rows[-1])"),
        ("p * masks[q][0]", "p"),
        ("interpolation=cv2.INTER_LINEAR", "interpolation=cv2.INTER_AREA"),
        ("constant_values=PADDING", "constant_values=0"),
    ),
    *_of(
        "plugins/lens_bench/perceive/clip.py",
        "tests/plugins/test_bench_clip.py",
        (
            "image = pil.composite(image, pil.new",
            "image = pil.composite(pil.new('RGB', image.size), pil.new",
        ),
        ("len(TEMPLATES), -1).mean(1)", "len(TEMPLATES), -1)[:, 0]"),
        ("self.config.prefix + question", "question"),
    ),
    *_of(
        "plugins/lens_bench/perceive/cache.py",
        "tests/plugins/test_bench_perception.py",
        ('entry["check"] != _check(', "None == _check("),
        ("if header != self.header:", "if header is None:"),
        ("return sha256, _hash(question)", 'return sha256, ""'),
    ),
    *_of(
        "plugins/lens_bench/oneig_dimensions.py",
        "tests/plugins/test_bench_oneig.py",
        ("answers[name] == YES", "answers[name].strip() == YES"),
        ("yes.get(str(p), True)", "yes.get(str(p), False)"),
        ("max(csd, 0.0), max(encoder, 0.0)", "csd, encoder"),
    ),
    *_of(
        "plugins/lens_bench/oneig.py",
        "tests/plugins/test_bench_text.py",
        ("1 - min(worst, distance)", "1 - distance"),
        ('without_sentinel(ocr_raw, "addCriterion")', "ocr_raw"),
    ),
    *_of(
        "plugins/lens_bench/report.py",
        "tests/plugins/test_bench_score.py",
        ("Row(verdict or nothing, cluster, group)", "Row(verdict or nothing, cluster)"),
        ("            self._check_perceiver(line, number)\n", "            pass\n"),
    ),
    *_of(
        "plugins/lens_bench/benchmarks.py",
        "tests/plugins/test_bench_score.py",
        ("whole = set(tasks) >= set(geneval.TAGS)", "whole = bool(tasks)"),
        ("set(tasks) >= set(geneval.TAGS)", "set(tasks) == set(geneval.TAGS)"),
        ('| {"edit_distance": worst, "completed": 0}', '| {"completed": 0}'),
        ("scores.binary = scores.binary and shares", "scores.binary = scores.binary"),
        ("for i in range(of)]", "for i in range(min(of, 1))]"),
    ),
    *_of(
        "lens_core/evaluation/generation.py",
        "tests/core/test_stages.py",
        ('failures = failures + 1 if status == "failed" else 0', "failures = 0"),
        ('"seed": request.seed if seeded else None', '"seed": None'),
    ),
    *_of(
        "lens_core/evaluation/decision.py",
        "tests/core/test_stages.py",
        ("return PictureScore(score.prompt_id, score.index, score.task, 0.0, score.weight)", "return score"),
        ("if score.value is not None or (score.prompt_id, score.index) in unscored", "if score.value is not None"),
    ),
    *_of(
        "lens_core/evaluation/statistics.py",
        "tests/core/test_stages.py",
        ("np.bincount(index, scores * each, len(places))", "np.bincount(index, scores, len(places))"),
    ),
    *_of(
        "lens_core/evaluation/manifest.py",
        "tests/core/test_manifest.py",
        ('or self.entries[k].status == "failed"]', 'or self.entries[k].status != "ok"]'),
        ("            _remove_torn_line(self.path)\n", ""),
        ("hash_of(path) != entry.sha256", "False"),
    ),
]


def _copy(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, target / name)


def flaw(mutant: Mutant) -> str:
    """Why a mutant cannot be applied; "" where it can."""
    path = ROOT / mutant.file
    count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
    absent = [t for t in mutant.tests if t.startswith("tests/") and not (ROOT / t.partition("::")[0]).is_file()]
    if count != 1:
        return f"{mutant.file}: {mutant.old!r} occurs {count} times; it must occur once"
    if mutant.old == mutant.new or absent:
        return f"{mutant.file}: {mutant.old!r} changes nothing, or its tests are missing: {absent}"
    return ""


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests pass although `mutant` is in the copy `tree`; afterwards the copy is as it was."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    paths = os.pathsep.join([str(tree), str(tree / "plugins")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(before, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed: the tests could not run
        raise SystemExit(f"{mutant.file}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in m.file or w in m.new for w in words)]
    flaws = [f for f in map(flaw, chosen) if f]
    if flaws:
        print("\n".join(flaws))
        return 1
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        _copy(Path(folder))
        for mutant in chosen:
            survived = survives(mutant, Path(folder))
            alive += survived
            what = mutant.new.strip() or f"no {mutant.old.strip()}"
            print(f"{'SURVIVED' if survived else 'killed  '}  {mutant.file}: {what}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants are killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
