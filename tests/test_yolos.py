"""What is YOLOS's own: one layer, attention cut out of a ViT's, no replay. The rest is in test_families.py."""

from __future__ import annotations

import pytest
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.grids import extents, frames_differ
from hf_detrkd.losses.detection import task_loss
from hf_detrkd.methods import build_methods

if "yolos" not in zoo.NAMES:
    pytest.skip("this transformers has no yolos", allow_module_level=True)

N, PATCHES = zoo.QUERIES, (zoo.SIZE // 16) ** 2


def close(a, b, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def layers_of(model, inputs):
    """What the ViT itself reports of all its layers, in eager attention."""
    with torch.no_grad():
        return model(**inputs, output_attentions=True, output_hidden_states=True)


@pytest.mark.parametrize("mid", [True, False])
def test_memory_and_queries_are_what_the_layers_get(mid):
    model, inputs = (
        zoo.build("yolos", attn_implementation="eager", use_mid_position_embeddings=mid),
        zoo.batch(labels=False),
    )
    _, view = adapter_for(model).forward(inputs)
    vit = model.vit
    given = []
    hook = vit.encoder.layer[-1].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    layers_of(model, inputs)
    hook.remove()
    normed = vit.encoder.layer[-1].layernorm_before(given[0])
    close(view.memory, normed[:, 1:-N])
    assert view.memory_shapes == ((4, 4),) and view.memory_mask is None
    close(view.features[0].flatten(2).mT, view.memory)
    close(view.queries.content, vit.embeddings(inputs["pixel_values"])[:, -N:])


def test_memory_of_another_image_shape():
    """Rows and columns are not exchanged."""
    model = zoo.build("yolos")
    pixels = torch.randn(1, 3, 48, 96)
    _, view = adapter_for(model).forward({"pixel_values": pixels})
    assert view.memory_shapes == ((3, 6),)
    other = pixels.clone()
    other[..., :16, 80:] += 1.0  # the patch in the first row, last column
    patches = [model.vit.embeddings.patch_embeddings(x).mT.unflatten(-1, (3, 6)) for x in (pixels, other)]
    changed = (patches[0] - patches[1]).abs().sum(1)[0] > 0
    assert changed.nonzero().tolist() == [[0, 5]]
    (maps,) = view.memory_maps()
    assert torch.equal(maps, view.features[0])


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_attention_maps(implementation):
    model, inputs = zoo.build("yolos", attn_implementation=implementation), zoo.batch(labels=False)
    adapter = adapter_for(model)
    with torch.no_grad():
        output, view = adapter.forward(inputs, attentions=True)
        _, without = adapter.forward(inputs)
        eager = zoo.build("yolos", attn_implementation="eager")
    close(view.logits[-1], output.logits)
    close(view.logits, without.logits)
    assert without.self_attentions is None
    (reported,) = layers_of(eager, inputs).attentions[-1:]
    rows = reported[:, :, -N:]
    (among,), (to_memory,) = view.self_attentions.weights, view.cross_attentions.weights
    assert among.shape == (2, 2, N, N) and to_memory.shape == (2, 2, N, PATCHES)
    assert view.self_attentions.kind == view.cross_attentions.kind == "dense"
    close(among, rows[..., -N:] / rows[..., -N:].sum(-1, keepdim=True))
    close(to_memory, rows[..., 1:-N] / rows[..., 1:-N].sum(-1, keepdim=True))


def test_only_the_last_layer_is_eager():
    model = zoo.build("yolos")
    used = []
    for layer in model.vit.encoder.layer:
        attention = layer.attention.attention
        attention.register_forward_hook(lambda module, args, output: used.append(output[1] is not None))
    adapter_for(model).forward(zoo.batch(labels=False), attentions=True)
    assert used == [False, False, True]


def test_attention_teaches_the_layers():
    model = zoo.build("yolos").train()
    _, view = adapter_for(model).forward(zoo.batch(), attentions=True)
    sum(maps.weights[0].square().sum() for maps in (view.self_attentions, view.cross_attentions)).backward()
    for layer in model.vit.encoder.layer:
        assert layer.attention.attention.query.weight.grad.any()


@pytest.mark.parametrize("labels", [False, True])
def test_autocast(labels):
    model, inputs = zoo.build("yolos").train(labels), zoo.batch(labels=labels)
    adapter = adapter_for(model)
    _, exact = adapter.forward(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, view = adapter.forward(inputs, attentions=True)
    assert view.logits.dtype == view.boxes.dtype == view.hidden_states.dtype == torch.float32
    close(view.boxes[-1], output.pred_boxes.float(), 0.03)
    assert not torch.equal(view.boxes, view.boxes.bfloat16().float())
    assert (view.logits - exact.logits).abs().mean() < 0.1 * exact.logits.std()
    view.logits.sum().backward()


def test_the_padding_lies_where_the_partner_sees_it():
    """YOLOS reads no pixel mask, but its image fills no more of the pixels for that."""
    batch = zoo.batch(pad=True, labels=False)
    views = [adapter_for(zoo.build(name)).forward(batch)[1] for name in ("yolos", "detr")]
    assert not frames_differ(*views)
    shares = [extents(view.memory_masks()[0]) / torch.tensor(view.memory_shapes[0]) for view in views]
    assert torch.equal(*shares) and shares[0].tolist() == [[1, 1], [1, 0.5]]


def test_one_layer_is_supervised():
    """Per-layer supervision finds one layer: the loss is transformers' own."""
    model, batch = zoo.build("yolos").train(), zoo.batch()
    expected = model(**batch).loss
    with task_loss(adapter_for(model), per_layer=True):
        output, view = adapter_for(model).forward(batch)
    assert torch.equal(output.loss, expected)
    assert len(view.logits) == 1


def test_no_replay():
    adapter = adapter_for(zoo.build("yolos"))
    assert "replay" not in adapter.provides
    assert {"self_attentions", "cross_attentions", "content"} <= adapter.provides
    _, view = adapter.forward(zoo.batch(labels=False))
    with pytest.raises(ValueError, match="no other queries can be decoded on the memory"):
        view.replay(view.queries)
    with pytest.raises(ValueError, match="know no boxes"):
        view.queries_from_boxes(view.boxes[-1])


def test_methods_that_replay_are_refused():
    adapters = adapter_for(zoo.build("yolos")), adapter_for(zoo.build("detr"))
    with pytest.raises(ValueError, match=r"`kd_detr` needs replay from the student, which `yolos` doesn't provide"):
        build_methods(["kd_detr"], None, *adapters)


def test_auxiliary_loss_is_refused():
    model = zoo.build("yolos", auxiliary_loss=True)
    with pytest.raises((TypeError, AttributeError)):
        model(**zoo.batch())  # why
    with pytest.raises(ValueError, match="`auxiliary_loss` of the yolos model is True"):
        adapter_for(model)


@pytest.mark.parametrize(
    ("method", "settings"), [("logit_kd", {}), ("features", {}), ("drkd", {}), ("drkd", {"instances": "query"})]
)
@pytest.mark.parametrize("pair", [("yolos", "rt_detr"), ("detr", "yolos"), ("yolos", "yolos")])
def test_as_student_and_teacher(method, settings, pair):
    """Ten steps lower the method's terms."""
    student, teacher = (zoo.build(name, seed=seed) for seed, name in enumerate(pair))
    adapters = adapter_for(student), adapter_for(teacher)
    torch.manual_seed(0)
    module = DistillationModel(student, adapters[0], build_methods([method], settings, *adapters), detection_weight=0.0)
    batch = zoo.batch()
    with torch.no_grad():
        view = adapters[1].forward({"pixel_values": batch["pixel_values"]})[1]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = module.train()(**batch, teacher_view=view, generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_compiled_layers():
    model, inputs = zoo.build("yolos"), zoo.batch(labels=False)
    adapter = adapter_for(model)
    expected = adapter.forward(inputs, attentions=True)[1]
    for layer in model.vit.encoder.layer[:-1]:
        layer.compile(backend="eager")
    compiled = adapter.forward(inputs, attentions=True)[1]
    close(compiled.logits, expected.logits)
    close(compiled.memory, expected.memory)
