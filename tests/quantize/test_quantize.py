"""Matrices to codes: bounds, an optimum that numpy finds too, inputs meant to break it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model
from torch import Tensor

from receptance.model.parts import Linear
from receptance.quantize import (
    Quantized,
    check_group,
    quantize,
    quantize_with_feedback,
    relative_error,
    rounding,
)
from receptance.quantize.calibration import Calibration
from receptance.quantize.weights import quantize_tensors

GROUPS = [32, 64, 128]
every_group = pytest.mark.parametrize("group", GROUPS)
every_format = pytest.mark.parametrize(
    ("kind", "group"), [("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128)]
)


def draw(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Weights, a few of them much larger than the others: [N,K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    return weight * (1 + 4 * (torch.rand(outputs, inputs, generator=generator) > 0.95))


def correlated(inputs: int, seed: int = 0) -> Tensor:
    """Mean products of inputs that have much in common: [K,K]."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(512, inputs // 4 + 1, generator=generator)
    mixed = common @ torch.randn(inputs // 4 + 1, inputs, generator=generator)
    x = mixed + torch.randn(512, inputs, generator=generator)
    return x.T @ x / len(x)


def spread(params: Tensor, quantized: Quantized) -> Tensor:
    """[N,K/G] -> [N,K] float64."""
    columns = torch.arange(quantized.codes.shape[1]) // quantized.group
    return params.double()[:, columns]


def errors(weight: Tensor, quantized: Quantized) -> Tensor:
    """[N,K] float64."""
    return weight.double() - quantized.dequantize().double()


def same(one: Quantized, other: Quantized) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.params(), other.params())


sizes = st.integers(1, 200)
seeds = st.integers(0, 999)


class TestInt8:
    @settings(max_examples=30)
    @given(sizes, sizes, seeds, st.sampled_from([1.0, 1e-30, 1e30, 3e-5]))
    def test_no_weight_is_off_by_more_than_half_a_step(self, outputs, inputs, seed, size):
        weight = draw(outputs, inputs, seed) * size
        quantized = quantize(weight, "int8")
        step = spread(quantized.scale, quantized)
        assert (errors(weight, quantized).abs() <= step * 0.50001).all()

    def test_torch_rounds_to_the_same_codes(self):
        weight = draw(20, 128)
        quantized = quantize(weight, "int8")
        scale = quantized.scale[:, 0].float()
        zeros = torch.zeros(20, dtype=torch.int32)
        theirs = torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -127, 127)
        torch.testing.assert_close(quantized.dequantize(), theirs)


class TestInt4:
    @every_group
    @settings(max_examples=30)
    @given(sizes, sizes, seeds)
    def test_the_plain_range_is_off_by_half_a_step(self, group, outputs, inputs, seed):
        weight = draw(outputs, inputs, seed)
        quantized = quantize(weight, "int4", group, search=False)
        step = spread(quantized.scale, quantized)
        # The last code may fall short of the largest weight by the rounding of the scale.
        assert (errors(weight, quantized).abs() <= step * 0.5001 + 1e-6).all()

    @every_group
    @settings(max_examples=30)
    @given(sizes, sizes, seeds, st.booleans())
    def test_the_search_is_never_worse_than_the_plain_range(
        self, group, outputs, inputs, seed, weighs
    ):
        weight = draw(outputs, inputs, seed)
        importance = torch.rand(inputs, generator=torch.Generator().manual_seed(seed)).square()
        importance = importance if weighs else torch.ones(inputs)
        found = quantize(weight, "int4", group, importance if weighs else None)
        plain = quantize(weight, "int4", group, search=False)
        squares = [errors(weight, x).square() * importance for x in (found, plain)]
        for part in zip(*(x.split(group, dim=1) for x in squares), strict=True):
            searched, spanned = (x.sum(1) for x in part)
            assert (searched <= spanned * (1 + 1e-5) + 1e-12).all()

    @every_group
    def test_the_search_pays(self, group):
        weight = draw(64, 1024)
        plain = quantize(weight, "int4", group, search=False)
        assert relative_error(weight, quantize(weight, "int4", group)) < 0.93 * relative_error(
            weight, plain
        )

    def test_fitting_again_pays(self, monkeypatch):
        weight = draw(64, 1024)
        found = relative_error(weight, quantize(weight, "int4"))
        monkeypatch.setattr(rounding, "_REFITS", 0)
        assert found < relative_error(weight, quantize(weight, "int4"))

    def test_importance_lowers_what_it_weighs(self):
        generator = torch.Generator().manual_seed(0)
        weight, importance = draw(64, 256), torch.rand(256, generator=generator).pow(4)
        plain, weighed = (quantize(weight, "int4", 64, x) for x in (None, importance))
        was, now = ((errors(weight, x).square() * importance).sum() for x in (plain, weighed))
        assert now < 0.95 * was

    def test_equal_importance_is_none(self):
        weight = draw(20, 190)
        assert same(quantize(weight, "int4"), quantize(weight, "int4", importance=torch.ones(190)))

    @settings(max_examples=30)
    @given(seeds)
    def test_a_fit_is_what_least_squares_finds(self, seed):
        weight = draw(3, 64, seed)
        importance = 0.1 + torch.rand(3, 64, generator=torch.Generator().manual_seed(seed))
        scale, minimum = torch.full((3,), 0.3), torch.full((3,), -2.0)
        codes = rounding.nearest(weight, scale[:, None], minimum[:, None], "int4")
        found = rounding._Search(weight, importance).fit(scale, minimum)
        for row in range(3):
            root = importance[row].sqrt().double().numpy()
            columns = np.stack([codes[row].double().numpy(), np.ones(64)], axis=1)
            target = weight[row].double().numpy()
            wanted, (least,), *_ = np.linalg.lstsq(columns * root[:, None], target * root)
            scale_, minimum_, error = (float(x[row]) for x in found)
            assert abs(scale_ - wanted[0]) <= abs(wanted[0]) / 256
            # The minimum goes with the scale as it was rounded.
            best = np.average(target - scale_ * columns[:, 0], weights=root**2)
            assert abs(minimum_ - best) <= abs(best) / 256 + 1e-6
            left = root * (columns @ (scale_, minimum_) - target)
            assert error == pytest.approx(left @ left, rel=1e-3)
            assert least <= left @ left * (1 + 1e-9)


class TestEveryFormat:
    @every_format
    @settings(max_examples=30)
    @given(seeds, st.integers(-40, 40))
    def test_powers_of_two_change_the_scales_alone(self, kind, group, seed, power):
        weight, factor = draw(5, 140, seed), 2.0**power
        one, other = quantize(weight, kind, group), quantize(weight * factor, kind, group)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.params() * factor, other.params())

    @every_format
    def test_rows_do_not_depend_on_each_other(self, kind, group, monkeypatch):
        weight = draw(50, 300)
        whole = quantize(weight, kind, group)
        monkeypatch.setattr(rounding, "_CHUNK", 1000)
        assert same(quantize(weight, kind, group), whole)
        assert same(quantize(weight[7:9], kind, group), whole.rows(slice(7, 9)))

    @every_format
    def test_groups_do_not_depend_on_each_other(self, kind, group):
        weight = draw(9, 2 * group + 3)
        whole, last = quantize(weight, kind, group), quantize(weight[:, 2 * group :], kind, group)
        assert torch.equal(whole.codes[:, 2 * group :], last.codes)
        assert torch.equal(whole.params()[:, 2:], last.params())

    @every_format
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types_are_what_they_say_in_float32(self, kind, group, dtype):
        weight = draw(9, 200).to(dtype)
        assert same(quantize(weight, kind, group), quantize(weight.float(), kind, group))

    @every_format
    def test_zeros_stay_zeros(self, kind, group):
        assert not quantize(torch.zeros(3, 70), kind, group).dequantize().any()

    @every_format
    @pytest.mark.parametrize("value", [0.3, -0.3, 1e-30, -7e20, 1.0])
    def test_a_constant_is_kept(self, kind, group, value):
        weight = torch.full((3, 70), value)
        error = relative_error(weight / value, quantize(weight / value, kind, group))
        assert error < (1 / 256 if kind == "int8" else 1e-4)
        found = quantize(weight, kind, group).dequantize()
        torch.testing.assert_close(found, weight, rtol=1 / 256, atol=0)

    @every_group
    def test_a_narrow_range_far_from_zero(self, group):
        """Coarser than the range itself, the rounding of the minimum must not decide."""
        weight = 1 + 1e-4 * torch.rand(5, 100, generator=torch.Generator().manual_seed(0))
        assert errors(weight, quantize(weight, "int4", group)).abs().max() < 6e-4

    @every_format
    def test_an_outlier_spoils_its_own_group_only(self, kind, group):
        weight = draw(4, 3 * group)
        spoilt = weight.clone()
        spoilt[1, group + 1] = 1e6
        before, after = quantize(weight, kind, group), quantize(spoilt, kind, group)
        differs = (before.dequantize() != after.dequantize()).nonzero()
        assert set(map(tuple, (differs // torch.tensor([1, group])).tolist())) == {(1, 1)}
        assert abs(after.dequantize()[1, group + 1] - 1e6) < 1e6 / 128

    @every_format
    def test_tiny_numbers(self, kind, group):
        found = quantize(torch.full((2, 40), 1e-44), kind, group).dequantize()
        assert found.isfinite().all()
        assert found.abs().max() < 1e-37

    @every_format
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_numbers_that_are_none(self, kind, group, bad):
        weight = draw(4, 70)
        weight[1, 2] = bad
        with pytest.raises(ValueError, match="1 of its 280 weights are infinite or not numbers"):
            quantize(weight, kind, group)

    @pytest.mark.parametrize(
        ("kind", "group", "words"),
        [
            ("int8", 64, "int8 has no groups of 64 weights; choose 128"),
            ("int4", 16, "int4 has no groups of 16 weights; choose 32 or 64 or 128"),
            ("int2", None, "cannot be quantized to 'int2'; choose int8 or int4"),
        ],
    )
    def test_unknown_formats(self, kind, group, words):
        with pytest.raises(ValueError, match=words):
            quantize(draw(4, 70), kind, group)

    def test_usual_groups(self):
        assert (check_group("int8", None), check_group("int4", None)) == (128, 64)

    @pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 4), (4, 0)])
    def test_what_is_no_matrix(self, shape):
        with pytest.raises(ValueError, match="is no matrix of float weights"):
            quantize(torch.zeros(shape), "int8")

    @pytest.mark.parametrize(
        "importance", [torch.ones(3), -torch.ones(70), torch.full((70,), torch.nan)]
    )
    def test_importance_that_does_not_fit(self, importance):
        with pytest.raises(ValueError, match=r"wanted \[70\] numbers of at least 0"):
            quantize(draw(4, 70), "int4", importance=importance)

    def test_inputs_that_never_occur(self):
        weight = draw(4, 128)
        found = quantize(weight, "int4", 64, torch.zeros(128))
        assert same(found, quantize(weight, "int4", 64, search=False))


class TestFeedback:
    @every_group
    def test_it_pays_where_inputs_are_correlated(self, group):
        weight, moments = draw(40, 200), correlated(200)

        def damage(quantized: Quantized) -> float:
            d = errors(weight, quantized)
            return float(((d @ moments.double()) * d).sum())

        without = quantize(weight, "int4", group, moments.diagonal())
        assert damage(quantize_with_feedback(weight, moments, group)) < 0.6 * damage(without)

    @every_group
    def test_without_correlation_nothing_is_handed_on(self, group):
        generator = torch.Generator().manual_seed(9)
        weight, importance = draw(9, 200), torch.rand(200, generator=generator) + 0.1
        found = quantize_with_feedback(weight, torch.diag(importance), group)
        assert same(found, quantize(weight, "int4", group, importance))

    @pytest.mark.parametrize("scale", [2.0**-126, 2.0**-140, 2.0**100])
    def test_only_ratios_of_moments_matter(self, scale):
        """Even of numbers that float32 hardly holds."""
        weight, moments = draw(10, 70), torch.eye(70) + 0.5
        wanted = quantize_with_feedback(weight, moments, 32)
        found = quantize_with_feedback(weight, moments * scale, 32)
        assert torch.equal(found.codes, wanted.codes)

    def test_each_code_is_the_best_after_those_before_it(self):
        """The weights not rounded yet solve a linear system; numpy solves it at every step."""
        weight, moments = draw(6, 80), correlated(80)
        quantized = quantize_with_feedback(weight, moments, 32)
        scale, minimum = (
            spread(x, quantized).numpy() for x in (quantized.scale, quantized.minimum)
        )
        damped = moments.double().numpy() + 0.01 * float(moments.diagonal().mean()) * np.eye(80)
        exact, target = weight.double().numpy(), weight.double().numpy().copy()
        codes, agree = quantized.codes.numpy(), 0
        for j in range(80):
            best = np.clip(np.round((target[:, j] - minimum[:, j]) / scale[:, j]), 0, 15)
            agree += int((best == codes[:, j]).sum())
            done = exact[:, : j + 1] - (scale * codes + minimum)[:, : j + 1]
            rest, first = slice(j + 1, None), slice(0, j + 1)
            moved = np.linalg.solve(damped[rest, rest], damped[rest, first] @ done.T).T
            target[:, rest] = exact[:, rest] + moved
        assert agree >= codes.size - 2  # float32 may see a tie elsewhere

    def test_outputs_do_not_depend_on_each_other(self, monkeypatch):
        weight, moments = draw(10, 70), correlated(70)
        whole = quantize_with_feedback(weight, moments)
        monkeypatch.setattr("receptance.quantize.feedback._OUTPUTS", 4)
        assert same(quantize_with_feedback(weight, moments), whole)

    @pytest.mark.parametrize("dead", [slice(0, 40), slice(None)])
    def test_inputs_that_never_occur(self, dead):
        moments = correlated(70)
        moments[dead] = moments[:, dead] = 0
        weight = draw(5, 70)
        assert relative_error(weight, quantize_with_feedback(weight, moments)) < 0.3

    def test_fewer_positions_than_inputs(self):
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
        weight = draw(5, 70)
        assert relative_error(weight, quantize_with_feedback(weight, x.T @ x / 3)) < 0.5

    @pytest.mark.parametrize("moments", [torch.eye(3), torch.full((70, 70), torch.nan)])
    def test_refusals(self, moments):
        with pytest.raises(ValueError, match="wanted finite numbers"):
            quantize_with_feedback(draw(4, 70), moments)


TOKENS = torch.randint(256, (3, 150), generator=torch.Generator().manual_seed(0))


class TestCalibration:
    @torch.no_grad()
    def test_the_head_reads_features(self):
        model = make_model()
        features = model.features(TOKENS)[0].flatten(0, 1)
        found = Calibration(model, TOKENS).moments("head.weight")
        torch.testing.assert_close(found, features.T @ features / TOKENS.numel())

    def test_products_of_positions_give_the_mean_square_of_outputs(self):
        """For every matrix W, mean |W x|^2 is the trace of W H W', whoever computed it."""
        model = make_model()
        calibration, squares = Calibration(model, TOKENS), {}

        def watch(layer, _, output, name):
            squares[name] = output.detach().square().sum() / TOKENS.numel()

        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                layer.register_forward_hook(lambda *x, name=f"{name}.weight": watch(*x, name=name))
        model(TOKENS)
        assert len(squares) == 7 * 2 + 1
        for name, wanted in squares.items():
            weight, moments = model.get_parameter(name).detach(), calibration.moments(name)
            torch.testing.assert_close(
                ((weight @ moments) * weight).sum(), wanted, rtol=1e-4, atol=0
            )

    def test_memory_changes_the_readings_and_nothing_else(self):
        model, readings = make_model(), []
        model.blocks[0].register_forward_pre_hook(lambda *_: readings.append(1))
        names = [name for name, x in model.named_parameters() if x.dim() == 2]
        found = {}
        for memory in (1 << 30, 10_000, 0):
            readings.clear()
            calibration = Calibration(model, TOKENS, memory=memory)
            found[memory] = {name: calibration.moments(name) for name in names}, len(readings)
        assert [count for _, count in found.values()] == [1, 5, 15]
        for other in (10_000, 0):
            for name, moments in found[1 << 30][0].items():
                assert moments is None or torch.equal(moments, found[other][0][name])

    def test_names_in_any_order_cost_no_more_readings(self):
        model, readings = make_model(layers=12), []
        model.blocks[0].register_forward_pre_hook(lambda *_: readings.append(1))
        alphabetically = dict(sorted(model.state_dict().items()))
        memory = 2 * 4 * (6 * 16**2 + 64**2)  # two layers
        calibration = Calibration(model, TOKENS, memory=memory)
        assert len(list(quantize_tensors(alphabetically, "int4", 32, calibration))) == len(
            alphabetically
        )
        assert len(readings) == 7

    def test_the_embedding_is_multiplied_with_nothing(self):
        assert Calibration(make_model(), TOKENS).moments("emb.weight") is None

    def test_no_hooks_stay_behind(self):
        model = make_model()
        Calibration(model, TOKENS).moments("head.weight")
        assert not any(layer._forward_pre_hooks for layer in model.modules())

    def test_too_few_tokens(self):
        with pytest.raises(ValueError, match="12 tokens are too few to calibrate with"):
            Calibration(make_model(), TOKENS[:, :4])


class TestModels:
    @every_format
    def test_matrices_become_codes_and_nothing_else_does(self, kind, group):
        model = make_model()
        found = dict(quantize_tensors(model.state_dict(), kind, group))
        assert list(found) == list(model.state_dict())
        for name, exact in model.state_dict().items():
            weight = found[name]
            if isinstance(weight, Quantized):
                assert (weight.kind, weight.group) == (kind, group)
                assert same(weight, quantize(exact, kind, group))
            else:
                assert torch.equal(weight, exact)
        assert sum(isinstance(x, Quantized) for x in found.values()) == 2 + 7 * 2

    def test_half_precision_models(self):
        found = dict(quantize_tensors(make_model().bfloat16().state_dict(), "int8"))
        assert {x.dtype for x in found.values() if isinstance(x, Tensor)} == {torch.float32}

    def test_calibrated_logits_are_closer(self):
        model = make_model(width=32)
        exact = model(TOKENS)[0].detach()
        distances = []
        for calibration in (None, Calibration(make_model(width=32), TOKENS)):
            found = quantize_tensors(make_model(width=32).state_dict(), "int4", 32, calibration)
            floats = {n: x.dequantize() if isinstance(x, Quantized) else x for n, x in found}
            model.load_state_dict(floats)
            distances.append(float((model(TOKENS)[0].detach() - exact).norm()))
        assert distances[1] < 0.9 * distances[0]

    def test_int8_takes_no_calibration(self):
        calibration = Calibration(make_model(), TOKENS)
        with pytest.raises(ValueError, match="int8 is exact enough without a text"):
            next(quantize_tensors(make_model().state_dict(), "int8", None, calibration))

    @pytest.mark.parametrize("name", ["blocks.1.ffn.value.weight", "blocks.0.att.time_mix_k"])
    def test_the_tensor_with_the_bad_number_is_named(self, name):
        model = make_model()
        with torch.no_grad():
            model.get_parameter(name).flatten()[3] = torch.nan
        with pytest.raises(ValueError, match=f"^{name} cannot be quantized: .* infinite"):
            list(quantize_tensors(model.state_dict(), "int8"))


class TestQuantized:
    def test_refusals(self):
        good = quantize(draw(4, 70), "int4")
        for wrong in (
            ("int4", 64, good.codes, good.scale, None),
            ("int4", 32, good.codes, good.scale, good.minimum),
            ("int4", 64, good.codes.to(torch.int8), good.scale, good.minimum),
            ("int4", 64, good.codes, good.scale.float(), good.minimum),
            ("int8", 128, good.codes.to(torch.int8), good.scale, None),
        ):
            with pytest.raises(ValueError, match="codes are"):
                Quantized(*wrong)

    @settings(max_examples=30)
    @given(sizes, sizes)
    def test_relative_error_is_that_of_the_definition(self, outputs, inputs):
        weight = draw(outputs, inputs)
        quantized = quantize(weight, "int4")
        wanted = errors(weight, quantized).norm() / weight.double().norm()
        assert relative_error(weight, quantized) == pytest.approx(float(wanted), rel=1e-4, abs=1e-7)


def test_weights_at_the_end_of_float32_stay_finite():
    weight = torch.full((16, 130), -3.4e38)
    quantized = quantize(weight, "int4")
    assert quantized.dequantize().isfinite().all()
    assert relative_error(weight, quantized) < 0.01
