"""Commands beside drawing, training and measuring.

block_cost      `lens bench block`: what a block launches, copies and moves, counted
commands        the commands, which parse, call one function of the modules below, and print
convert         `lens convert`: a checkpoint from one layout to another, or to another dtype, a piece at a time
curves          `lens curves`: what runs have logged, drawn over their steps
doctor          `lens doctor`: this machine, and what would fit on it
gpu_check       `lens doctor --check`: stages in processes of their own, with time limits and results on disk
gpu_latency     its second stage: seconds a picture, against the published arithmetic; gpu_training: its third
gpu_report      its results as a page
preview_fit     `lens fit-preview`: the linear map of step previews, fitted to a VAE
plain_port      the published transformer, plain and padded, on the weights of ours
records         results on disk after every item; timing: rounds in turn, medians, kernels
reference       what every component is and takes, read from the code
reference_pages     the same as text and as Markdown
reference_commands  `lens components`, `lens show`, `lens new-plugin`
scaffold    a new plugin's package, from the components in templates/
training_speed  `lens bench train`: what a training step costs, by part, packed and bucketed
"""

from __future__ import annotations

from lens_core import hookimpl


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_tools import commands, reference_commands  # light; so `lens --help` can describe them

    functions = {"bench block": "bench_block", "bench train": "bench_train", "doctor": "doctor"}
    functions |= {"convert": "convert", "curves": "curves", "fit-preview": "fit_preview"}
    places = {name: f"{commands.__name__}:{function}" for name, function in functions.items()}
    functions = {"components": "components", "show": "show", "new-plugin": "new_plugin"}
    return places | {name: f"{reference_commands.__name__}:{function}" for name, function in functions.items()}
