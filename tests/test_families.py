"""The contract of `FamilyAdapter`, for every family: evaluation, training, training with labels."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from dataclasses import replace

import families_table
import pytest
import torch
import transformers
import zoo

from hf_detrkd.families import FAMILIES, FamilyAdapter, adapter_for
from hf_detrkd.families.checks import checkpointing
from hf_detrkd.view import DetrView, Queries

MODES = ["eval", "train", "train with labels"]
CASES = [(name, mode) for name in zoo.NAMES for mode in MODES]
CASES += [(name, "eval with labels") for name in zoo.NAMES if name in ("detr", "d_fine", "deimv2", "lw_detr")]
TOLERANCE = 1e-5
SAMPLED = [n for n in zoo.NAMES if n.startswith(("deformable", "rt_", "d_fine", "deim", "lw_", "rf_"))]
DETR_LIKE = ["detr", "table-transformer", "conditional_detr"]

every_model = pytest.mark.parametrize("name", zoo.NAMES)
every_model_and_mode = pytest.mark.parametrize(("name", "mode"), CASES)
every_replayed = pytest.mark.parametrize("name", zoo.REPLAYED)
every_replayed_and_mode = pytest.mark.parametrize(("name", "mode"), [case for case in CASES if case[0] in zoo.REPLAYED])


def prepared(name: str, mode: str = "eval", pad: bool = False, **build) -> tuple[FamilyAdapter, dict]:
    model = zoo.build(name, **build).train(mode.startswith("train"))
    return adapter_for(model), zoo.batch(labels=mode.endswith("labels"), pad=pad)


def run(adapter: FamilyAdapter, inputs: dict, **settings):
    """The same random numbers and buffers for every run, so that runs can be compared."""
    buffers = {name: buffer.clone() for name, buffer in adapter.model.named_buffers()}
    torch.manual_seed(0)
    result = adapter.forward(inputs, **settings)
    for name, buffer in adapter.model.named_buffers():
        buffer.data.copy_(buffers[name])
    return result


@functools.cache
def observed(name: str, mode: str = "eval"):
    """Adapter, inputs (with padding), output and view of one forward, for tests that change nothing."""
    adapter, inputs = prepared(name, mode, pad=True)
    return adapter, inputs, *run(adapter, inputs)


def close(a, b, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def same_predictions(a: DetrView, b: DetrView, tolerance: float = TOLERANCE) -> None:
    close(a.logits, b.logits, tolerance)
    close(a.boxes, b.boxes, tolerance)
    close(a.hidden_states, b.hidden_states, 10 * tolerance)  # their scale is larger


def own(adapter: FamilyAdapter, output, name: str = "logits") -> torch.Tensor:
    """What the model's output says of the model's own queries."""
    return output[name][:, adapter.own(output[name].shape[1])]


def any_queries(view: DetrView, number: int) -> Queries:
    """Queries that are not the model's own."""
    generator = torch.Generator().manual_seed(number)

    def like(value):
        return None if value is None else torch.rand(*value.shape[:1], number, value.shape[2], generator=generator)

    queries = view.queries
    return Queries(like(queries.content), like(queries.position), like(queries.reference))


def fingerprint(model) -> dict:
    """Everything of a model that an adapter could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "hooks": [(name, len(getattr(m, kind))) for name, m in model.named_modules() for kind in hooks],
        "training": [m.training for m in model.modules()],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "config": model.config.to_dict(),
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
    }


# ------------------------------------------------------------------------------------------------------- forward


@every_model_and_mode
def test_forward_leaves_output_and_model_as_they_are(name, mode):
    adapter, inputs = prepared(name, mode)
    before = fingerprint(adapter.model)
    output, view = run(adapter, inputs)
    if "replay" in adapter.provides:
        view.replay(view.queries)
    assert fingerprint(adapter.model) == before
    assert adapter._call is None

    adapter.close()
    plain_model = copy.deepcopy(adapter.model)
    assert fingerprint(plain_model) == before
    torch.manual_seed(0)
    plain = plain_model(**inputs)
    assert type(output) is type(plain) and list(output) == list(plain)
    ours, theirs = (torch.utils._pytree.tree_leaves(dict(x)) for x in (output, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@every_model_and_mode
def test_last_layer_is_the_models_output(name, mode):
    adapter, _, output, view = observed(name, mode)
    close(view.logits[-1], own(adapter, output))
    close(view.boxes[-1], own(adapter, output, "pred_boxes"))
    close(view.hidden_states[-1], own(adapter, output, "last_hidden_state"))


@every_model_and_mode
def test_shapes_are_what_the_adapter_says(name, mode):
    adapter, _, _, view = observed(name, mode)
    batch, layers, queries, width = 2, adapter.num_layers, adapter.num_queries, adapter.width
    columns = adapter.num_classes + (adapter.classification == "softmax")
    assert view.classification == adapter.classification
    assert view.logits.shape == (layers, batch, queries, columns)
    assert view.boxes.shape == (layers, batch, queries, 4)
    assert view.hidden_states.shape == (layers, batch, queries, width)
    assert view.class_probs().shape == (layers, batch, queries, zoo.CLASSES)
    assert view.queries.content.shape == (batch, queries, width)
    tokens = sum(height * width for height, width in view.memory_shapes)
    assert view.memory.shape == (batch, tokens, adapter.memory_width)
    assert tuple(feature.shape[1] for feature in view.features) == adapter.feature_channels
    assert [f.shape[-1] for f in view.features] == sorted((f.shape[-1] for f in view.features), reverse=True)
    assert ("position" in adapter.provides) == (view.queries.position is not None)
    assert ("reference" in adapter.provides) == (view.queries.reference is not None)
    if view.queries.reference is not None:
        assert view.queries.reference.shape == (batch, queries, adapter.reference_size)
    assert ("content" in adapter.provides) == bool(view.queries.content.any())
    # Where the padding lies the view knows also of families that don't read masks
    assert view.memory_mask.dtype == torch.bool and view.memory_mask.shape == (batch, tokens)
    assert view.memory_mask[0].all() and not view.memory_mask[1].all()


@pytest.mark.parametrize("name", [n for n in zoo.REPLAYED if n not in DETR_LIKE])
def test_every_layer_is_what_the_model_itself_reports(name):
    """Against the auxiliary outputs of transformers' loss, which cover all layers but the last."""
    adapter, inputs = prepared(name, "train with labels", auxiliary_loss=True)
    output, view = run(adapter, inputs)
    layers = range(adapter.num_layers - 1)
    auxiliary = output.auxiliary_outputs
    if adapter.model.config.model_type in ("d_fine", "deimv2"):
        # theirs begin with what a head before the first refinement says, and lack the last but one layer
        auxiliary, layers = auxiliary[1:], layers[:-1]
    for layer in layers:
        close(view.logits[layer], own(adapter, auxiliary[layer]))
        close(view.boxes[layer].clamp(0, 1), own(adapter, auxiliary[layer], "pred_boxes").clamp(0, 1))


@pytest.mark.parametrize("name", DETR_LIKE)
def test_auxiliary_loss_is_followed(name):
    """The flag changes what these models compute; views are of the model as it is configured."""
    adapter, inputs = prepared(name, "train with labels", auxiliary_loss=True)
    output, view = run(adapter, inputs)
    close(view.logits[-1], output.logits)
    for layer, auxiliary in enumerate(output.auxiliary_outputs):
        close(view.logits[layer], auxiliary["logits"])
        close(view.boxes[layer], auxiliary["pred_boxes"])
    same_predictions(view, view.replay(view.queries))


@every_model
def test_layer_predictions_are_there_for_the_loss(name):
    adapter, inputs = prepared(name, "train with labels")
    model, seen = adapter.model, {}
    loss_function = model.loss_function

    def spy(logits, *args, **kwargs):
        seen["own"] = adapter.layer_predictions()
        seen["every"] = adapter.layer_predictions(every_query=True)
        seen["logits"] = logits
        return loss_function(logits, *args, **kwargs)

    model.loss_function = spy
    output, view = run(adapter, inputs)
    logits, boxes = seen["own"]
    assert torch.equal(logits, view.logits) and torch.equal(boxes, view.boxes)
    close(logits[-1], own(adapter, output))
    close(boxes[-1], own(adapter, output, "pred_boxes"))
    close(seen["every"][0][-1], seen["logits"])
    close(seen["every"][1][-1], output.pred_boxes)
    with pytest.raises(RuntimeError, match="during `FamilyAdapter"):
        adapter.layer_predictions()


@pytest.mark.parametrize("name", ["rt_detr", "lw_detr"])
def test_denoising_and_group_queries_never_appear(name):
    adapter, inputs = prepared(name, "train with labels")
    output, view = run(adapter, inputs)
    assert output.logits.shape[1] > adapter.num_queries  # there are some
    assert view.logits.shape[2] == adapter.num_queries == view.queries.content.shape[1]
    # Own queries of the same step without labels: the denoising queries can't be seen by them
    adapter_without, _ = prepared(name, "train")
    inputs.pop("labels")
    _, without = run(adapter_without, inputs)
    same_predictions(view, without)


def test_a_batch_without_boxes_has_no_denoising():
    adapter, _ = prepared("rt_detr", "train")
    output, view = run(adapter, zoo.batch(targets=(0,)))
    assert output.logits.shape[1] == adapter.num_queries
    close(view.logits[-1], output.logits)


@every_model
def test_padding(name):
    """Families that read masks don't attend to what lies under the padding; the others say that they read none."""
    adapter, inputs, _, view = observed(name)
    noise = torch.rand(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(1))
    noisy = inputs["pixel_values"] + noise * (1 - inputs["pixel_mask"][:, None])
    _, changed = run(adapter, {**inputs, "pixel_values": noisy})
    close(view.logits[:, 0], changed.logits[:, 0])  # no padding in the first image
    assert not torch.allclose(view.features[0][1], changed.features[0][1], atol=1e-2)
    assert view.memory_mask[0].all() and not view.memory_mask[1].all()
    if "padding" not in adapter.provides:
        if "replay" in adapter.provides:
            assert torch.equal(view.replay(view.queries).memory_mask, view.memory_mask)
        without = {name: value for name, value in inputs.items() if name != "pixel_mask"}
        assert run(adapter, without)[1].memory_mask is None
        return
    memory = view.memory.masked_fill(~view.memory_mask[..., None], 3.0)
    elsewhere = replace(view, decoder_arguments={**view.decoder_arguments, "encoder_hidden_states": memory})
    same_predictions(view, elsewhere.replay(view.queries))
    memory = view.memory.masked_fill(view.memory_mask[..., None], 3.0)
    elsewhere = replace(view, decoder_arguments={**view.decoder_arguments, "encoder_hidden_states": memory})
    assert (view.logits - elsewhere.replay(view.queries).logits).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------------- replay


@every_replayed_and_mode
def test_replaying_own_queries_gives_every_layer(name, mode):
    adapter, _, _, view = observed(name, mode)
    before = fingerprint(adapter.model)
    replayed = view.replay(view.queries)
    same_predictions(view, replayed)
    same_predictions(view, replayed.replay(replayed.queries))  # a replay can be replayed
    assert fingerprint(adapter.model) == before


@pytest.mark.parametrize("mode", ["eval", "train with labels"])
@every_replayed
def test_groups_do_not_see_each_other(name, mode):
    adapter, _, _, view = observed(name, mode)
    few, many = any_queries(view, 4), any_queries(view, 11)
    alone = [view.replay(group) for group in (few, view.queries, many)]
    before = fingerprint(adapter.model)
    together = view.replay(few, view.queries, many)
    assert fingerprint(adapter.model) == before
    for a, b in zip(alone, together, strict=True):
        same_predictions(a, b)
    assert [v.logits.shape[2] for v in together] == [4, adapter.num_queries, 11]
    # In one group they do see each other
    joined = view.replay(Queries.concatenate([few, many]))
    assert (joined.logits[:, :, :4] - alone[0].logits).abs().max() > 1e-4


@every_replayed
def test_any_queries_decode_with_gradients(name):
    adapter, inputs = prepared(name, "train with labels")
    adapter.feature_module.requires_grad_(True)  # transformers freezes the backbone of some
    model = adapter.model
    _, view = run(adapter, inputs)

    def gradients(replayed: DetrView) -> set[str]:
        model.zero_grad()
        (replayed.logits.square().sum() + replayed.boxes.square().sum()).backward(retain_graph=True)
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    queries = any_queries(view, 9)
    queries.content.requires_grad_()
    reached = gradients(view.replay(queries))
    assert queries.content.grad.abs().sum() > 0
    features = {f"{prefix}." for prefix, m in model.named_modules() if m is adapter.feature_module}
    in_decoder = {n for n, _ in model.named_parameters() if n.startswith("model.decoder.layers.")}
    in_backbone = {n for n, _ in model.named_parameters() if n.startswith(tuple(features))}
    in_encoder = {n for n, _ in model.named_parameters() if n.startswith("model.encoder.")}
    assert len(reached & in_decoder) > 0.8 * len(in_decoder)
    assert len(reached & in_backbone) > 0.5 * len(in_backbone)
    assert not in_encoder or reached & in_encoder
    heads = {n for n, _ in model.named_parameters() if "class" in n and "enc_" not in n and "denoising" not in n}
    assert reached & heads

    detached = gradients(view.replay(queries, detach_memory=True))
    assert detached & in_decoder and not detached & (in_backbone | in_encoder)


@every_replayed
def test_gradients_reach_positions_and_references(name):
    _, _, _, view = observed(name)
    queries = any_queries(view, 5)
    parts = [part for part in (queries.position, queries.reference) if part is not None]
    for part in parts:
        part.requires_grad_()
    view.replay(queries, detach_memory=True).logits.sum().backward()
    for part in parts:
        assert part.grad.isfinite().all() and part.grad.abs().sum() > 0


@every_replayed
def test_references_on_the_border_are_finite(name):
    _, _, _, view = observed(name)
    queries = any_queries(view, 2)
    if queries.reference is None:
        pytest.skip("no references")
    border = torch.tensor([0.0, 1.0])[None, :, None].expand_as(queries.reference).clone().requires_grad_()
    replayed = view.replay(Queries(queries.content, queries.position, border), detach_memory=True)
    (replayed.logits.sum() + replayed.boxes.sum()).backward()
    assert replayed.logits.isfinite().all() and replayed.boxes.isfinite().all()
    if name != "dab-detr":  # it divides by width and height
        assert border.grad.isfinite().all()


@every_model
def test_queries_from_boxes(name):
    adapter, _, _, view = observed(name)
    boxes = zoo.batch(targets=(7,))["labels"]
    boxes = torch.stack([target["boxes"] for target in boxes])
    if "queries_from_boxes" not in adapter.provides:
        with pytest.raises(ValueError, match="know no boxes"):
            view.queries_from_boxes(boxes)
        return
    queries = view.queries_from_boxes(boxes)
    close(queries.reference, boxes[..., : adapter.reference_size])
    replayed = view.replay(queries)
    assert replayed.logits.shape[2] == 7
    moved = view.replay(view.queries_from_boxes(boxes.roll(1, dims=1)))
    assert (replayed.boxes - moved.boxes).abs().max() > 1e-4  # the place reaches the decoder
    if adapter.reference_size == 4:
        # Asked for the boxes of its own queries, the model answers as it did
        same = view.queries_from_boxes(view.queries.reference)
        if "content" in adapter.provides and name != "deformable_detr_two_stage":
            close(same.content, view.queries.content)
        same_predictions(view, view.replay(same), 1e-4)


def test_a_centre_reaches_conditional_detr():
    adapter, inputs = prepared("conditional_detr")
    _, view = run(adapter, inputs)
    position = view.queries.position
    centre = adapter.decoder.ref_point_head(position).sigmoid()
    close(view.queries.reference, centre)
    same_predictions(view, view.replay(Queries(view.queries.content, position)))  # left out: the decoder's own
    corner = view.replay(Queries(view.queries.content, position, torch.full_like(centre, 0.1)))
    middle = view.replay(view.queries)
    assert (corner.logits - middle.logits).abs().max() > 1e-2  # its cross-attention looks elsewhere


def test_labels_give_the_content_of_rt_detr():
    model = zoo.build("rt_detr")
    adapter = adapter_for(model, classes=[3, 1])
    _, view = adapter.forward(zoo.batch(labels=False))
    labels = torch.tensor([[0, 1], [1, 0]])
    queries = view.queries_from_boxes(torch.rand(2, 2, 4), labels)
    embedding = model.model.denoising_class_embed.weight
    close(queries.content[0], embedding[[3, 1]])
    close(queries.content[1], embedding[[1, 3]])


# ------------------------------------------------------------------------------------------------------- attention


def layer_outputs(model, module_name: str, inputs: dict) -> list:
    """What a module of every decoder layer returns in the model's own forward."""
    outputs = []
    hooks = [
        getattr(layer, module_name).register_forward_hook(lambda module, args, output: outputs.append(output[1]))
        for layer in model.model.decoder.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize(
    ("name", "implementation"), [*((n, None) for n in zoo.REPLAYED), ("detr", "eager"), ("rt_detr", "eager")]
)
def test_attention_maps(name, implementation):
    adapter, inputs = prepared(name, "eval", pad=True, attn_implementation=implementation)
    before = fingerprint(adapter.model)
    output, view = run(adapter, inputs, attentions=True)
    assert fingerprint(adapter.model) == before
    close(view.logits[-1], output.logits)
    same_predictions(view, run(adapter, inputs)[1], 2e-5)

    self_attentions, cross = view.self_attentions, view.cross_attentions
    queries, tokens = adapter.num_queries, view.memory.shape[1]
    assert self_attentions.kind == "dense" and len(self_attentions.weights) == adapter.num_layers
    for weights in self_attentions.weights:
        assert weights.shape[2:] == (queries, queries)
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert len(cross.weights) == adapter.num_layers
    if "cross_attentions" in adapter.provides:
        for weights in cross.weights:
            assert cross.kind == "dense" and weights.shape[2:] == (queries, tokens)
            close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            hidden = ~view.memory_mask[:, None, None].expand_as(weights)
            assert weights[hidden].abs().max() < 1e-6
    else:
        assert "sampled_attentions" in adapter.provides and cross.kind == "sampled"
        points = sum(cross.levels)
        assert len(cross.levels) == len(view.memory_shapes)
        for weights, locations in zip(cross.weights, cross.locations, strict=True):
            assert weights.shape[1] == queries and weights.shape[3] == points
            assert locations.shape == (*weights.shape, 2)
            close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    own_outputs = layer_outputs(adapter.model, adapter.cross_attention, {**inputs})
    for weights, reported in zip(cross.weights, own_outputs, strict=True):
        if reported is not None:  # transformers' own attention gives none under sdpa
            close(weights.flatten(), reported.flatten())

    replayed = view.replay(view.queries, any_queries(view, 3))
    same_predictions(view, replayed[0], 2e-5)
    for kind in ("self_attentions", "cross_attentions"):
        ours, again = getattr(view, kind), getattr(replayed[0], kind)
        for a, b in zip(ours.weights, again.weights, strict=True):
            close(a, b, 2e-5)
        assert len(getattr(replayed[1], kind).weights) == adapter.num_layers
    assert replayed[1].self_attentions.weights[0].shape[2:] == (3, 3)
    close(
        replayed[1].self_attentions.weights[0].sum(-1), torch.ones_like(replayed[1].self_attentions.weights[0][..., 0])
    )


@pytest.mark.parametrize("name", ["rt_detr", "lw_detr", "detr"])
def test_attention_maps_in_training_are_of_own_queries(name):
    adapter, inputs = prepared(name, "train with labels")
    _, view = run(adapter, inputs, attentions=True)
    for weights in view.self_attentions.weights:
        assert weights.shape[0] == 2 and weights.shape[2:] == (adapter.num_queries,) * 2
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))  # nothing of it lies on the queries cut away
    for a, b in zip(view.self_attentions.weights, view.replay(view.queries).self_attentions.weights, strict=True):
        close(a, b, 2e-5)
    sum(weights.square().sum() for weights in view.cross_attentions.weights).backward()
    assert adapter.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_points_give_what_the_decoder_reads(name):
    """Weights and locations, sampled from the values by hand, are the output of the cross-attention."""
    adapter, inputs = prepared(name)
    attention = getattr(adapter.decoder.layers[0], adapter.cross_attention)
    seen = {}
    hook = attention.register_forward_hook(lambda module, args, output: seen.update(output=output[0]))
    _, view = run(adapter, inputs, attentions=True)
    hook.remove()
    weights, locations = view.cross_attentions.weights[0], view.cross_attentions.locations[0]
    heads = weights.shape[2]
    values = attention.value_proj(view.memory) if hasattr(attention, "value_proj") else view.memory
    expected = torch.zeros(*weights.shape[:3], values.shape[-1] // heads)
    token = point = 0
    for (height, width), number in zip(view.memory_shapes, view.cross_attentions.levels, strict=True):
        level = values[:, token : token + height * width].transpose(1, 2).unflatten(2, (height, width))
        for head, value in enumerate(level.chunk(heads, dim=1)):
            grid = 2 * locations[:, :, head, point : point + number] - 1
            sampled = torch.nn.functional.grid_sample(value, grid, align_corners=False)  # (B, d, Q, points)
            expected[:, :, head] += (
                (sampled * weights[:, None, :, head, point : point + number]).sum(-1).transpose(1, 2)
            )
        token, point = token + height * width, point + number
    expected = expected.flatten(2)
    close(attention.output_proj(expected) if hasattr(attention, "output_proj") else expected, seen["output"])


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("mode", ["eval", "train with labels"])
@every_replayed
def test_autocast(name, mode):
    adapter, inputs = prepared(name, mode)
    _, exact = run(adapter, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, view = run(adapter, inputs)
        replayed = view.replay(view.queries, any_queries(view, 3))
    assert view.logits.dtype == view.boxes.dtype == replayed[1].logits.dtype == torch.float32
    assert view.hidden_states.dtype == torch.float32
    close(view.boxes[-1], own(adapter, output, "pred_boxes").float(), 0.03)
    if adapter.boxes_to_queries is False or name in ("dab-detr", "conditional_detr"):
        # These models round their boxes to 8 bits; the view's heads don't
        assert not torch.equal(view.boxes, view.boxes.bfloat16().float())
        assert torch.equal(output.pred_boxes.float(), output.pred_boxes.bfloat16().float())
    if name not in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deformable_detr_two_stage", "lw_detr", "rf_detr"):
        # The others select their queries, and rounding may select others
        assert (view.logits - exact.logits).abs().mean() < 0.1 * exact.logits.std()
    assert (replayed[0].logits - view.logits).abs().mean() < 0.1 * view.logits.std()
    view.logits.sum().backward()


@every_model
def test_half_precision_weights(name):
    if name == "dab-detr":
        pytest.skip("transformers' DAB-DETR has float32 written into its forward")
    adapter, inputs = prepared(name)
    adapter.model.to(torch.bfloat16)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    inputs.pop("labels", None)
    output, view = run(adapter, inputs)
    assert view.logits.dtype == view.boxes.dtype == torch.float32
    close(view.logits[-1], output.logits.float(), 1e-6)
    if "replay" in adapter.provides:
        replayed = view.replay(any_queries(view, 4))  # float32 queries
        assert replayed.logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------- checkpointing

CHECKPOINTED = [n for n in zoo.NAMES if n in ("detr", "conditional_detr", "yolos") or n.startswith("deformable")]


def loss_gradients(adapter: FamilyAdapter, inputs: dict, attentions: bool) -> dict[str, torch.Tensor]:
    adapter.model.zero_grad()
    output, view = run(adapter, inputs, attentions=attentions)
    replayed = view.replay(view.queries, any_queries(view, 4)) if "replay" in adapter.provides else ()
    loss = output.loss + view.memory.square().mean() + view.hidden_states.square().mean()
    loss = loss + sum(v.logits.square().mean() + v.boxes.square().mean() for v in (view, *replayed))
    if attentions:
        loss = loss + sum(w.square().sum() for v in (view, *replayed) for w in v.cross_attentions.weights)
    loss.backward()
    return {n: p.grad.clone() for n, p in adapter.model.named_parameters() if p.grad is not None}


def checkpoint(model, **kwargs) -> None:
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # from 5.2x on
    enable = getattr(model, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": kwargs})


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(name, attentions):
    eager = {"attn_implementation": "eager"} if attentions else {}
    adapter, inputs = prepared(name, "train with labels", **eager)
    expected = loss_gradients(adapter, inputs, attentions)
    checkpoint(adapter.model, use_reentrant=False)
    assert checkpointing(adapter.layers)
    actual = loss_gradients(adapter, inputs, attentions)
    assert actual.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(actual[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_reentrant_checkpointing_is_refused(name):
    adapter, inputs = prepared(name, "train with labels")
    checkpoint(adapter.model, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant"):
        adapter.forward(inputs)
    adapter.model.eval()  # not in use in evaluation
    adapter.forward(inputs)


def test_attention_maps_under_checkpointing_need_eager_attention():
    adapter, inputs = prepared("detr", "train with labels")
    checkpoint(adapter.model, use_reentrant=False)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        adapter.forward(inputs, attentions=True)


# ------------------------------------------------------------------------------------------------------- the rest


@every_model
def test_a_failing_forward_leaves_the_model_as_it_was(name):
    adapter, inputs = prepared(name, "train with labels")
    before = fingerprint(adapter.model)
    hook = adapter.layers[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.forward(inputs, attentions=True)
    hook.remove()
    assert fingerprint(adapter.model) == before
    assert adapter._call is None


@every_model
def test_nothing_of_the_batch_outlives_the_view(name):
    adapter, inputs = prepared(name, "train with labels")
    output, view = run(adapter, inputs, attentions=True)
    memory = weakref.ref(view.memory)
    del output, view
    assert memory() is None  # at once: there are no cycles to collect


@every_model
def test_scores_are_probabilities_or_iou(name):
    """A query whose box doesn't fit the target it is given: its score is to rise where scores are probabilities alone."""
    adapter, inputs = prepared(name)
    outside = {
        "class_labels": torch.tensor([1]),
        "boxes": torch.tensor([[2.5, 2.5, 0.1, 0.1]]),
    }  # overlaps with nothing
    original, logits = adapter.model.loss_function, []

    def keep(values, *args, **kwargs):
        logits.append(values)
        return original(values, *args, **kwargs)

    adapter.model.loss_function = keep
    output, view = run(adapter, {**inputs, "labels": [outside] * len(inputs["pixel_values"])})
    assert (view.boxes[..., :2] + view.boxes[..., 2:] / 2).amax() < 2.4
    (gradient,) = torch.autograd.grad(output.loss, logits)
    # LW-DETR's line asks for 0.01 where a box doesn't fit at all
    assert (gradient[..., 1] < -0.003).any() == ("quality_scores" not in adapter.provides)


@every_model
def test_classes_of_the_views(name):
    """Sigmoid: columns. Softmax: the other classes count as no-object, exactly."""
    model, inputs = zoo.build(name), zoo.batch(labels=False)
    _, full = adapter_for(model).forward(inputs)
    kept = [3, 0, 4]
    adapter = adapter_for(model, classes=kept)
    _, view = adapter.forward(inputs)
    assert adapter.num_classes == 3
    close(view.class_probs(), full.class_probs()[..., kept])
    close(view.boxes, full.boxes)
    if adapter.classification == "softmax":
        probabilities = full.logits.softmax(-1)
        close(view.logits.softmax(-1)[..., -1], probabilities[..., [1, 2, 5]].sum(-1))
        assert view.logits.shape[-1] == 4
    if "replay" in adapter.provides:
        replayed = view.replay(view.queries)
        close(replayed.logits, view.logits)
    model.train()
    labelled = zoo.batch()
    seen = []
    loss_function = model.loss_function
    model.loss_function = lambda *a, **k: (seen.append(adapter.layer_predictions()), loss_function(*a, **k))[1]
    adapter.forward(labelled)
    assert seen[0][0].shape[-1] == full.logits.shape[-1]  # all classes for the task loss


@pytest.mark.parametrize("classes", [[], [0, 0], [5], [-1]])
def test_wrong_classes_are_refused(classes):
    with pytest.raises(ValueError, match=r"`classes` is .*different indices of the model's 5 classes"):
        adapter_for(zoo.build("detr"), classes=classes)


def test_wrong_queries_are_refused():
    adapter, inputs = prepared("rt_detr")
    _, view = adapter.forward(inputs)
    content, reference = view.queries.content, view.queries.reference
    with pytest.raises(ValueError, match=r"`reference` of the queries has shape None.*needs \(B, k, 4\) with B 2"):
        view.replay(Queries(content))
    with pytest.raises(ValueError, match=r"`content` of the queries has shape \(2, 6, 9\).*needs \(B, k, 16\)"):
        view.replay(Queries(content[..., :9], None, reference))
    with pytest.raises(ValueError, match=r"`content` of the queries has shape \(1, 6, 16\)"):
        view.replay(Queries(content[:1], None, reference[:1]))
    with pytest.raises(ValueError, match=r"`reference` of the queries has shape \(2, 6, 2\)"):
        view.replay(Queries(content, None, reference[..., :2]))


def test_unknown_models_are_refused():
    unknown = zoo.build("detr")
    unknown.config.model_type = "sparse_detr"
    with pytest.raises(ValueError) as error:
        adapter_for(unknown)
    message = str(error.value)
    assert "DetrForObjectDetection" in message and "'sparse_detr'" in message
    assert all(family in message for family in FAMILIES)
    assert "To add one" in message and "FAMILIES" in message

    detector = zoo.build("detr")
    with pytest.raises(ValueError, match=r"DetrModel.*no object detector.*AutoModelForObjectDetection"):
        adapter_for(detector.model)
    with pytest.raises(TypeError, match=r"a Linear; it must be a transformers PreTrainedModel"):
        adapter_for(torch.nn.Linear(1, 1))


def test_decoders_that_views_cannot_follow_are_refused():
    adapter, inputs = prepared("conditional_detr", "train", decoder_layerdrop=0.5)
    with pytest.raises(ValueError, match="`decoder_layerdrop` is"):
        adapter.forward(inputs)
    adapter.model.eval()
    adapter.forward(inputs)
    if "d_fine" in zoo.NAMES:
        with pytest.raises(ValueError, match="`eval_idx` of the model is 0"):
            model = zoo.build("d_fine")
            model.config.eval_idx = model.eval_idx = 0
            adapter_for(model)


def test_families_are_covered():
    """Every family has a tiny model, and every line of the table names a model type of some transformers."""
    assert {model_type for model_type, _ in zoo.CONFIGS.values()} == set(FAMILIES)
    assert list(FAMILIES) == sorted(FAMILIES)
    for family, adapter in FAMILIES.items():
        assert issubclass(adapter, FamilyAdapter) and inspect.getdoc(adapter), family
    missing = {family for family in FAMILIES if family not in transformers.CONFIG_MAPPING}
    assert missing == {CONFIG for name, (CONFIG, _) in zoo.CONFIGS.items() if name not in zoo.NAMES}


def test_the_table_in_the_docs():
    if len(zoo.NAMES) < len(zoo.CONFIGS):
        pytest.skip("this transformers lacks families of the table")
    assert families_table.TABLE.read_text(encoding="utf-8") == families_table.render(), (
        "docs/families.md is not what the code says; run `python tests/families_table.py`"
    )


@pytest.mark.slow
def test_compiled_backbone_and_encoder():
    """`torch.compile` of backbone and encoder, as hf_detrkd does it: features come from every batch anew."""
    adapter, _ = prepared("detr")
    expected = [adapter.forward(zoo.batch(labels=False, seed=seed))[1] for seed in range(3)]
    adapter.feature_module.compile(backend="eager")
    adapter.base.encoder.compile(backend="eager")
    for seed, view in enumerate(expected):
        _, compiled = adapter.forward(zoo.batch(labels=False, seed=seed))
        same_predictions(view, compiled)
        close(view.features[0], compiled.features[0])


def test_patterns_of_dab_detr_are_queries():
    adapter, inputs = prepared("dab-detr", num_patterns=2)
    _, view = run(adapter, inputs)
    assert adapter.num_queries == 2 * zoo.QUERIES == view.logits.shape[2]
    assert "content" in adapter.provides
    same_predictions(view, view.replay(view.queries))
