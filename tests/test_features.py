"""Losses on feature maps: numbers worked out by hand, slow reference loops, and the settings of the method."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import zoo

from hf_detrkd.families import adapter_for
from hf_detrkd.losses.features import box_scores, cwd, feature_mse, fgd, pkd, relative_error, scale_masks
from hf_detrkd.methods import build_methods
from hf_detrkd.methods.features import SCALES
from hf_detrkd.projectors import GlobalContext, MapProjector, MaskedGeneration, MatchedScale, PairedMaps


def maps(*rows: tuple[float, ...]) -> torch.Tensor:
    """One image, one channel."""
    return torch.tensor(rows)[None, None]


def real(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)


def random_maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- numbers by hand


def test_scale_masks_of_one_box():
    """methods.md 6.6, 1."""
    box = [
        torch.tensor([[0.375, 0.375, 0.25, 0.25]]) + torch.tensor([[0.125, 0.125, 0.25, 0.25]])
    ]  # (.25,.25)-(.75,.75)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    foreground, background = scale_masks(box, mask)
    assert foreground.unique().tolist() == [0, 0.25]
    assert (foreground > 0).sum() == 4
    torch.testing.assert_close(background[foreground == 0], torch.full((12,), 1 / 12))
    foreground, background = scale_masks(box, mask, inclusive=True)
    assert (foreground > 0).sum() == 9
    torch.testing.assert_close(background.sum(), torch.tensor(1.0))


def test_scale_masks_leave_padding_out():
    box = [torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.zeros(0, 4)]
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[:, :2, :3] = True
    foreground, background = scale_masks(box, mask)
    torch.testing.assert_close(foreground[0], mask[0] / 6)
    assert not background[0].any()
    assert not foreground[1].any()
    torch.testing.assert_close(background[1], mask[1] / 6)


def test_score_weighted():
    """methods.md 9.1: squared errors 4 and 1 under scores .8 and .2 are 3.4; equal scores give the plain mean."""
    student, teacher = maps((2.0, 1.0)), maps((0.0, 0.0))
    assert feature_mse(student, teacher, torch.tensor([[[0.8, 0.2]]])).item() == pytest.approx(3.4)
    assert feature_mse(student, teacher, torch.full((1, 1, 2), 0.3)).item() == pytest.approx(2.5)


def test_relative_error():
    """Squared errors 1 and 4 under scores .8 and .2 are 1.6, the teacher's squares 4 and 16 are 6.4: a quarter."""
    student, teacher, scores = maps((1.0, 2.0)), maps((2.0, 4.0)), torch.tensor([[[0.8, 0.2]]])
    assert relative_error(student, teacher, scores).item() == pytest.approx(0.25)
    assert relative_error(1e-3 * student, 1e-3 * teacher, scores).item() == pytest.approx(0.25)
    assert relative_error(torch.zeros(1, 1, 1, 2), teacher, scores).item() == 1
    assert relative_error(student, torch.zeros(1, 1, 1, 2), scores).isfinite()
    assert relative_error(student, teacher, torch.zeros(1, 1, 2)).item() == 0


def test_relative_error_against_loops():
    student, teacher, weight = random_maps(0, 2, 3, 4, 5), random_maps(1, 2, 3, 4, 5), random_maps(2, 2, 4, 5).abs()
    error = squares = 0.0
    for image in range(2):
        for y in range(4):
            for x in range(5):
                for c in range(3):
                    own, its = student[image, c, y, x].item(), teacher[image, c, y, x].item()
                    error += weight[image, y, x].item() * (own - its) ** 2
                    squares += weight[image, y, x].item() * its**2
    assert relative_error(student, teacher, weight).item() == pytest.approx(error / squares, rel=1e-5)


def test_box_scores():
    boxes = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 0.01, 0.01]]])
    scores = box_scores(boxes, torch.tensor([[0.3, 0.9]]), torch.ones(1, 3, 3, dtype=torch.bool))
    expected = torch.tensor([[[0.3, 0.3, 0.0], [0.3, 0.9, 0.0], [0.3, 0.3, 0.0]]])
    torch.testing.assert_close(scores, expected)


def test_fgd_attention():
    """methods.md 9.8: the spatial attention of (1, 2; 3, 4) at two temperatures."""
    from hf_detrkd.losses.features import _where_it_looks

    teacher = maps((1.0, 2.0), (3.0, 4.0))
    for temperature, expected in {
        0.5: (0.008576, 0.063369, 0.468236, 3.459820),
        1.0: (0.128234, 0.348577, 0.947531, 2.575657),
    }.items():
        spatial, channel = _where_it_looks(teacher, real(teacher), temperature)
        torch.testing.assert_close(spatial.flatten(), torch.tensor(expected), rtol=0, atol=1e-5)
        assert channel.item() == 1


def test_mgd():
    """methods.md 9.9: nothing masked and an identity generator give the plain distance; all masked, no gradient."""
    generation = MaskedGeneration(1)
    for layer in (generation.layers[0], generation.layers[2]):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    student, teacher = maps((2.0, 2.0), (2.0, 2.0)).requires_grad_(), maps((1.0, 1.0), (1.0, 1.0))
    distance = feature_mse(generation(student, real(student), 0.0, None), teacher, real(teacher))
    assert 4 * 2e-5 * distance.item() == pytest.approx(8e-5)  # the released sum over four cells, alpha 2e-5
    torch.nn.init.constant_(generation.layers[0].bias, 0.5)
    feature_mse(generation(student, real(student), 1.0, None), teacher, real(teacher)).backward()
    assert not student.grad.any()


def test_mgd_leaves_out_a_share_of_the_cells():
    generation = MaskedGeneration(3)
    generation.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    x = torch.ones(2, 3, 40, 40)
    out = generation(x, real(x), 0.65, torch.Generator().manual_seed(0))
    assert (out == out[:, :1]).all()  # the same cells in all channels
    assert (out == 0).float().mean().item() == pytest.approx(0.65, abs=0.03)


def test_mgd_sees_nothing_of_the_padding():
    generation, mask = MaskedGeneration(3), torch.ones(2, 4, 4, dtype=torch.bool)
    x = random_maps(0, 2, 3, 4, 4)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1), value=7.0)
    out = generation(padded, torch.nn.functional.pad(mask, (0, 2, 0, 1)), 0.0, None)
    torch.testing.assert_close(out[..., :4, :4], generation(x, mask, 0.0, None))


def test_cwd():
    """methods.md 9.10."""
    teacher, student = maps((0.0, math.log(3))), maps((0.0, 0.0))
    assert cwd(student, teacher, real(student)).item() == pytest.approx(0.130812, abs=1e-5)
    assert cwd(student, teacher, real(student), temperature=4).item() == pytest.approx(0.149458, abs=1e-5)


def test_pkd():
    """methods.md 9.11: r is .8."""
    student, teacher = maps((1.0, 3.0, 2.0, 4.0)), maps((1.0, 2.0, 3.0, 4.0))
    assert pkd(student, teacher, real(student)).item() == pytest.approx(0.2, abs=1e-5)
    assert pkd(10 * student + 3, teacher, real(student)).item() == pytest.approx(0.2, abs=1e-5)


# ------------------------------------------------------------------------------------------------- reference loops


def fgd_by_loops(student, teacher, boxes, temperature=0.5, alpha=1e-3, beta=5e-4, gamma=1e-3):
    """One image, no padding, cell by cell."""
    _, channels, height, width = teacher.shape

    def softmax(values, scale):
        exps = [math.exp(value / temperature) for value in values]
        return [scale * e / sum(exps) for e in exps]

    def attention(maps):
        m = maps[0].abs().tolist()
        cells = [sum(m[c][y][x] for c in range(channels)) / channels for y in range(height) for x in range(width)]
        levels = [
            sum(m[c][y][x] for y in range(height) for x in range(width)) / (height * width) for c in range(channels)
        ]
        return softmax(cells, height * width), softmax(levels, channels)

    (spatial, channel), (own_spatial, own_channel) = attention(teacher), attention(student)
    foreground, background = scale_masks(boxes, real(teacher), inclusive=True)
    total = 0.0
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                d = (student[0, c, y, x] - teacher[0, c, y, x]).item() ** 2 * spatial[y * width + x] * channel[c]
                total += alpha * foreground[0, y, x].item() * d + beta * background[0, y, x].item() * d
    total += gamma * sum(abs(a - b) for a, b in zip(spatial, own_spatial, strict=True))
    return total + gamma * sum(abs(a - b) for a, b in zip(channel, own_channel, strict=True))


def test_fgd_against_loops():
    student, teacher = random_maps(0, 1, 3, 4, 5), random_maps(1, 1, 3, 4, 5)
    boxes = [torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.6, 0.6, 0.5, 0.3]])]
    value = fgd(student, teacher, scale_masks(boxes, real(student), inclusive=True), real(student))
    assert value.item() == pytest.approx(fgd_by_loops(student, teacher, boxes), rel=1e-5)


# ------------------------------------------------------------------------------------------------- every loss


def losses(student, teacher, mask):
    boxes = [torch.tensor([[0.5, 0.5, 0.5, 0.5]])] * len(student)
    return {
        "mse": feature_mse(student, teacher, mask),
        "relative": relative_error(student, teacher, mask),
        "fgd": fgd(student, teacher, scale_masks(boxes, mask, inclusive=True), mask),
        "cwd": cwd(student, teacher, mask),
        "pkd": pkd(student, teacher, mask),
    }


def test_padding_changes_nothing():
    student, teacher = random_maps(0, 2, 3, 4, 4), random_maps(1, 2, 3, 4, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)

    def padded(x, value):
        return torch.nn.functional.pad(x, (0, 2, 0, 1), value=value)

    expected = losses(student, teacher, mask)
    for name, value in losses(padded(student, 7.0), padded(teacher, -3.0), padded(mask, False)).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    context = GlobalContext(3)
    torch.nn.init.normal_(context.transform[-1].weight)
    out = context(padded(student, 7.0), padded(mask, False))
    torch.testing.assert_close(out[..., :4, :4], context(student, mask))


def test_an_identical_map_is_nothing_to_learn():
    x = random_maps(0, 2, 3, 4, 4)
    assert all(value == 0 for value in losses(x, x.clone(), real(x)).values())


def test_a_constant_channel_has_a_finite_gradient():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    pkd(x, random_maps(0, 1, 2, 3, 3), real(x)).backward()
    assert x.grad.isfinite().all()


def test_map_projector_pairs_levels_by_their_grids():
    student, teacher = adapter_for(zoo.build("detr", seed=1).eval()), adapter_for(zoo.build("rt_detr", seed=2).eval())
    images = {"pixel_values": zoo.batch()["pixel_values"]}
    views = student.forward(images)[1], teacher.forward(images)[1]
    for tap, levels in {"memory": 3, "backbone": 1}.items():
        pairs = MapProjector(student, teacher, tap)(*views)
        assert len(pairs) == levels
        for pair in pairs:
            assert pair.student.shape == pair.teacher.shape
            assert not pair.teacher.requires_grad


def paired(student, teacher, mask=None):
    return PairedMaps(student, teacher, real(student) if mask is None else mask)


def test_maps_of_a_larger_scale_come_in_the_unit_of_the_teachers():
    """Over both levels, the squares are 4 * 1 + 1 * 16 = 20 and 4 * 0.25 + 1 * 4 = 5: the factor is a half."""
    pairs = [
        paired(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)),
        paired(torch.full((1, 1, 1, 1), 4.0), torch.full((1, 1, 1, 1), -2.0)),
    ]
    scale = MatchedScale()
    first, second = scale(pairs)
    torch.testing.assert_close(first.student, pairs[0].teacher)
    torch.testing.assert_close(second.student, torch.full((1, 1, 1, 1), 2.0))
    # Kept, also in the saved state: a resumed run has the same unit
    resumed = MatchedScale()
    resumed.load_state_dict(scale.state_dict())
    for module in (scale, resumed):
        (later,) = module([paired(torch.full((1, 1, 2, 2), 10.0), torch.ones(1, 1, 2, 2))])
        torch.testing.assert_close(later.student, torch.full((1, 1, 2, 2), 5.0))


def test_maps_of_a_smaller_scale_stay_as_they_are():
    x = random_maps(0, 2, 3, 4, 4)
    for student, teacher in ((1e-3 * x, x), (x, x), (x, torch.zeros_like(x)), (torch.zeros_like(x), x)):
        assert MatchedScale()([paired(student, teacher)])[0].student.equal(student)


def test_the_scale_of_maps_is_of_their_real_cells():
    mask = torch.tensor([[[True, False]]])
    (pair,) = MatchedScale()([paired(maps((2.0, 1000.0)), maps((1.0, 0.0)), mask)])
    assert pair.student[0, 0, 0, 0] == 1


def test_the_relative_error_starts_small_between_families_of_different_scale():
    """A memory behind a LayerNorm beside one a hundredth as large: without a common unit the term begins at 60000."""
    student, teacher = adapter_for(zoo.build("detr", seed=1)), adapter_for(zoo.build("rt_detr", seed=2, d_model=32))
    (method,) = build_methods(["features"], {"loss": "relative"}, student, teacher)
    images = {"pixel_values": zoo.batch()["pixel_values"]}
    view = teacher.forward(images)[1]
    view = replace(view, memory=1e-2 * view.memory / view.memory.square().mean().sqrt())
    term = method(student.forward(images)[1], view, zoo.batch()["labels"], torch.Generator())["feature"]
    assert 0 < term < 3 * SCALES["relative"] * 4  # three levels, each error at most (1 + 1)^2 where cells weigh alike


def test_normalised_maps_are_the_same_at_any_scale():
    """The memory of an RT-DETR has a deviation of .03, that of a DETR one of 1."""
    student, teacher = (adapter_for(zoo.build("rt_detr", seed=seed)) for seed in (1, 2))
    (method,) = build_methods(["features"], {"loss": "mse", "normalize": True}, student, teacher)
    images = {"pixel_values": zoo.batch()["pixel_values"]}
    views = student.forward(images)[1], teacher.forward(images)[1]
    terms = []
    for deviation in (1.0, 0.03):
        small = [replace(view, memory=deviation * view.memory / view.memory.std(-1, keepdim=True)) for view in views]
        terms.append(method(*small, zoo.batch()["labels"], torch.Generator())["feature"].item())
    assert terms[1] == pytest.approx(terms[0], rel=2e-3)


@pytest.mark.parametrize("loss", SCALES)
@pytest.mark.parametrize("tap", ["memory", "backbone"])
def test_every_loss_trains(loss, tap):
    torch.manual_seed(0)
    student, teacher = (
        zoo.build("rt_detr", seed=1),
        zoo.build("rt_detr_v2", seed=2, d_model=32, encoder_hidden_dim=32, decoder_in_channels=[32, 32, 32]).eval(),
    )
    adapter, teacher_adapter = adapter_for(student), adapter_for(teacher)
    (method,) = build_methods(["features"], {"loss": loss, "tap": tap}, adapter, teacher_adapter)
    batch = zoo.batch(targets=(3, 0))
    images = {"pixel_values": batch["pixel_values"]}
    with torch.no_grad():
        view = teacher_adapter.forward(images)[1]
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(10):
        generator = torch.Generator().manual_seed(0)
        value = method(adapter.forward(images)[1], view, batch["labels"], generator)["feature"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(p.grad is not None for p in method.parameters())
    assert values[-1] < 0.95 * values[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "fgdd"}, "`loss` of FeaturesConfig is 'fgdd'; allowed are 'score', 'mse', 'relative'"),
        ({"masked_share": 1.5}, "`masked_share` is 1.5"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"weights": {"feature": 0.0}}, "nothing to distil"),
    ],
)
def test_settings_that_are_refused(settings, message):
    adapter = adapter_for(zoo.build("rt_detr", seed=1))
    with pytest.raises(ValueError, match=message):
        build_methods(["features"], settings, adapter, adapter)


def test_a_frozen_backbone_can_not_learn():
    student = zoo.build("rt_detr", seed=1)
    adapter = adapter_for(student)
    adapter.feature_module.requires_grad_(False)
    with pytest.raises(ValueError, match="the student's backbone is frozen"):
        build_methods(["features"], {"tap": "backbone"}, adapter, adapter)
