"""ComfyUI's graph in a PNG, read for what it says of one picture: prompts, seed, steps, guidance, sampler, size.

The chunk `prompt` maps a node's id to `{"class_type", "inputs"}`; an input is a value, or a link [id, output].
`workflow` is the editor's form of it, with values by place; the common nodes of it are read. Nothing is believed: the
number of nodes is bounded, and every walk along links ends at a node that it has met before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lens_core.io.readers import shown

MOST_NODES = 10_000
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "EmptyFlux2LatentImage": ("width", "height", "batch_size"),
    "RandomNoise": ("noise_seed",),
    "CFGGuider": ("cfg",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "FluxGuidance": ("guidance",),
    "ModelSamplingAuraFlow": ("shift",),
    "ModelSamplingSD3": ("shift",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "PrimitiveInt": ("value",),
    "PrimitiveFloat": ("value",),
    "PrimitiveNode": ("value",),
}
"""What the values of a node in a `workflow` are, by their places; "" is of no interest."""
SOURCES = {
    "prompt": ("positive", "conditioning", "guider"),
    "negative_prompt": ("negative", "guider"),
    "seed": ("noise",),
    "steps": ("sigmas",),
    "guidance_scale": ("guider",),
    "sampler": ("sampler",),
    "height": ("latent_image",),
    "width": ("latent_image",),
}
"""By which links of a sampler the node is reached that has a fact."""
FIELDS = {
    "prompt": ("text", "t5xxl", "value", "string"),
    "negative_prompt": ("text", "t5xxl", "value", "string"),
    "seed": ("seed", "noise_seed"),
    "steps": ("steps",),
    "guidance_scale": ("cfg",),
    "sampler": ("sampler_name",),
    "height": ("height",),
    "width": ("width",),
}
"""What nodes call a fact."""
FIRST, SECOND = ("conditioning_1", "conditioning_to"), ("conditioning_2", "conditioning_from")
"""The links of a node that puts two conditionings together: the text of the first is taken."""
THROUGH = {
    "prompt": ("positive", "conditioning", *FIRST, *FIELDS["prompt"]),
    "negative_prompt": ("negative", "conditioning", *FIRST, *FIELDS["negative_prompt"]),
}
"""Links that are followed further on the way to a text; to anything else, any link is."""

ZERO = "ConditioningZeroOut"
"""A conditioning without a text, whatever it is made of."""
NEUTRAL = {"denoise": 1, "batch_size": 1}
"""Values that change nothing."""
ELSEWHERE = ("filename_prefix", "control_after_generate")
"""What decides no picture."""

Place = tuple[str, str]  # the id of a node, and the name of an input
Graph = dict[str, tuple[str, dict[str, Any]]]  # id -> class, inputs


def read_prompt(data: Any) -> Graph:
    """The graph in the chunk `prompt`. Raises ValueError with the reason alone."""
    if not isinstance(data, dict):
        raise ValueError(f"its prompt must be an object, not {shown(data, 40)}")
    if len(data) > MOST_NODES:
        raise ValueError(f"its prompt has {len(data)} nodes; at most {MOST_NODES} are read")
    graph: Graph = {}
    for name, node in data.items():
        if isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict):
            graph[name] = node["class_type"], node["inputs"]
    return graph


def read_workflow(data: Any) -> Graph:
    """The same from the chunk `workflow`, as far as WIDGETS knows its nodes. Raises ValueError."""
    nodes = data.get("nodes") if isinstance(data, dict) else None
    links = data.get("links", []) if isinstance(data, dict) else None
    if not isinstance(nodes, list) or not isinstance(links, list):
        raise ValueError("its workflow has no lists of nodes and links")
    if len(nodes) > MOST_NODES or len(links) > 10 * MOST_NODES:
        raise ValueError(f"its workflow has {len(nodes)} nodes; at most {MOST_NODES} are read")
    origins = {
        str(link[0]): [str(link[1]), link[2]]
        for link in links
        if isinstance(link, list) and len(link) >= 3 and all(type(part) in (int, str) for part in link[:3])
    }
    graph: Graph = {}
    for node in nodes:
        if (
            not isinstance(node, dict)
            or type(node.get("id")) not in (int, str)
            or not isinstance(node.get("type"), str)
        ):
            continue
        values, slots = node.get("widgets_values"), node.get("inputs")
        names = WIDGETS.get(node["type"], ())
        inputs = dict(zip(names, values if isinstance(values, list) else [], strict=False))
        for slot in slots if isinstance(slots, list) else []:
            if isinstance(slot, dict) and isinstance(slot.get("name"), str) and str(slot.get("link")) in origins:
                inputs[slot["name"]] = origins[str(slot["link"])]
        graph[str(node["id"])] = node["type"], {name: value for name, value in inputs.items() if name}
    return graph


def facts(graph: Graph) -> tuple[dict[str, Any], list[str]]:
    """What one sampler of the graph says, by Lens's names and as it stands there; and lines for what is left out.

    Raises ValueError where there is no sampler."""
    samplers = sorted(
        (name for name, (kind, _) in graph.items() if kind in SAMPLERS), key=lambda name: (len(name), name)
    )
    if not samplers:
        raise ValueError(f"its graph has no sampler that is known ({', '.join(SAMPLERS)})")
    # Of a picture that is drawn and then refined, the sampler that begins at an empty latent is the one that draws it.
    chosen = next((name for name in samplers if _value(graph, name, "width", set()) is not None), samplers[0])
    kind, inputs = graph[chosen]
    used: set[Place] = set()
    values = {fact: _value(graph, chosen, fact, used) for fact in FIELDS}
    taken = {fact: value for fact, value in values.items() if value is not None}
    left = [f"node {name}: {graph[name][0]}, another sampler" for name in samplers if name != chosen]
    for fact in (fact for fact, value in values.items() if value is None and fact not in THROUGH):
        for link in (inputs[field] for field in FIELDS[fact] if _is_link(inputs.get(field))):
            left.append(f"{fact}: that of node {link[0]}, {_class(graph, link)}, which names no value")
    for name in ("scheduler", "denoise", "start_at_step", "end_at_step", "add_noise"):
        if name in inputs and not isinstance(inputs[name], list) and NEUTRAL.get(name) != inputs[name]:
            left.append(f"{name}: {shown(inputs[name], 60)} of node {chosen}, {kind}")
    return taken, left + [line for name in graph if name not in samplers for line in _left_of(graph, name, used)]


def _left_of(graph: Graph, name: str, used: set[Place]) -> Iterator[str]:
    """Lines for what a node says that is not `used`."""
    kind, inputs = graph[name]
    named = [
        f"{key}={shown(value, 60)}"
        for key, value in inputs.items()
        if not _is_link(value)
        and (name, key) not in used
        and key not in ELSEWHERE
        and value not in (None, "")
        and NEUTRAL.get(key) != value
    ]
    if named:
        yield f"node {name}: {kind}, {', '.join(named[:4])}"
    for key in SECOND:
        if _is_link(inputs.get(key)):
            yield f"node {name}: {kind}, whose {key} is {_second(graph, inputs[key])}"


def _second(graph: Graph, link: Any) -> str:
    """The class of a second conditioning, and its text if it is its own; a walk from each would take for ever."""
    text = graph[str(link[0])][1].get("text") if str(link[0]) in graph else None
    return f"{_class(graph, link)} {shown(text, 60)}" if isinstance(text, str) else _class(graph, link)


def _class(graph: Graph, link: Any) -> str:
    return graph[str(link[0])][0] if str(link[0]) in graph else "which is not there"


def _value(graph: Graph, sampler: str, fact: str, used: set[Place]) -> Any:
    """The value of a fact: the sampler's, or that of the nearest node that its links lead to; its place is `used`."""
    inputs = graph[sampler][1]
    for field in FIELDS[fact] if fact not in THROUGH else ():
        if field in inputs:
            return _followed(graph, inputs[field], fact, (sampler, field), used)
    for link in SOURCES[fact]:
        if link in inputs and (value := _followed(graph, inputs[link], fact, (sampler, link), used)) is not None:
            return value
    return None


def _followed(graph: Graph, start: Any, fact: str, place: Place, used: set[Place]) -> Any:
    """The first value of `fact` on the way along links from `start`, the input at `place`; a value itself. None if the
    way ends, or turns in a circle, before one."""
    waiting, seen = [(start, place)], set()
    while waiting:
        link, place = waiting.pop(0)
        if not _is_link(link):
            used.add(place)
            return link
        name = str(link[0])
        if name in seen or name not in graph:
            continue
        seen.add(name)
        kind, inputs = graph[name]
        # A refining sampler's latent is another's picture, whose size is its own.
        if kind in SAMPLERS or (kind == ZERO and fact in THROUGH):
            continue
        waiting += [(inputs[key], (name, key)) for key in _next(inputs, fact, place[1])]
    return None


def _next(inputs: Mapping[str, Any], fact: str, by: str) -> Iterator[str]:
    """Where to go on from a node that the input `by` led to: to the value if it has one, else along the links that may
    lead there."""
    direct = by in FIELDS[fact] or by == "value"  # the node is there for this value alone
    for field in (*FIELDS[fact], *(("value",) if direct else ())):
        # A node that resizes another's latents has a size too, but none that a picture is begun with.
        if field in inputs and not (fact in ("height", "width") and "samples" in inputs):
            yield field
            return
    names = THROUGH.get(fact, inputs)
    if (by, fact) == ("guider", "negative_prompt"):
        names = ("negative",)  # a guider's `conditioning` is what it draws
    for name, value in inputs.items():
        if _is_link(value) and name in names:
            yield name


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (str, int) and type(value[1]) is int
