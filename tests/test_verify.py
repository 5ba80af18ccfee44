"""What a search found, tried between the proxy and the target: scaling/verify.py and scaling/forecast.py."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from configure import Config, UserError
from scaling.forecast import forecast
from scaling.verify import count_trainings, size_below, sizes_between, verify

PROXY = Config(width=128, depth=4, context=64, batch=8, steps=40, vocab_size=256)
TARGET = replace(PROXY, width=1024, depth=12)


class FakeSearch:
    """Trains nothing: a loss that is `quality` of the Config above a power law, and seed noise."""

    def __init__(self, quality=lambda config: 10 * config.weight_decay, noise=0.003, seeds=3,
                 proxy_noise=None):
        self.options, self.dataset = {"seeds": seeds}, SimpleNamespace(vocab_size=256)
        self.quality, self.noise, self.trained = quality, noise, []
        self.proxy_noise = proxy_noise or noise

    def rows_of(self, configs, what):
        return [self.row_of(config) for config in configs]

    def row_of(self, config):
        self.trained.append(config)
        rng = np.random.default_rng(config.seed + config.width + round(1e6 * config.weight_decay))
        loss = law(config) + self.quality(config) + np.log2(config.lr / PROXY.lr)**2 / 5
        noise = self.proxy_noise if config.width == PROXY.width else self.noise
        return {"val_loss": loss + noise * rng.standard_normal(), "diverged": not np.isfinite(loss),
                "width": config.width, "parameters": 12 * config.depth * config.width**2, "seed": config.seed}


def law(config):
    return 2.5 + 40 * (config.depth * config.width**2) ** -0.35


def candidates_of(*decays):
    """Named like their weight decay, by which FakeSearch tells them apart."""
    return [(f"decay {decay}", replace(PROXY, weight_decay=decay)) for decay in decays]


def verified(search, target=TARGET, decays=(0.0, 0.01, 0.02, 0.03, 0.04)):
    return verify(search, candidates_of(*decays), target, sizes_between(PROXY, target))


@pytest.mark.parametrize(("target", "head_dim", "sizes"), [
    ((768, 12), 128, [(256, 6), (384, 8)]), ((8192, 4), 64, [(512, 4), (3648, 4)]),
    ((384, 4), 64, [(256, 4)]),
    ((256, 4), 64, []), ((256, 32), 64, []), ((128, 4), 64, [])])
def test_sizes_lie_between_the_proxy_and_the_target(target, head_dim, sizes):
    target = replace(TARGET, width=target[0], depth=target[1], head_dim=head_dim)
    assert sizes_between(replace(PROXY, head_dim=head_dim), target) == sizes


def test_sizes_hold_whole_heads_where_the_proxy_does_not():
    target = replace(TARGET, width=1024, head_dim=128)
    assert sizes_between(replace(PROXY, width=192, head_dim=64), replace(target, width=512))[0] == (384, 9)
    assert all(width % 128 == 0 for proxy in (64, 192) for width, _ in
               sizes_between(replace(PROXY, width=proxy, head_dim=64), target))


def test_each_column_of_the_table_has_the_noise_of_its_own_size():
    text = verified(FakeSearch(noise=0.0, proxy_noise=0.3)).text
    errors = [float(error) for line in text.splitlines() if line.startswith("  decay")
              for error in re.findall(r"± ([0-9.]+)", line)]
    assert min(errors[::2]) > 0.05 > 0.01 > max(errors[1::2])


def test_the_gain_is_that_over_the_settings_that_the_target_has_itself():
    """And not over a leader that is these at another lr."""
    own = "config/proxy.py = your target's own settings"
    names = ["leader 1", "leader 2 = your target's own settings at lr x 1.4", own]
    candidates = list(zip(names, (config for _, config in candidates_of(0.0, 0.01, 0.02)), strict=True))
    text = verify(FakeSearch(), candidates, TARGET, sizes_between(PROXY, TARGET)).text
    [gain] = re.findall(f"leader 1 ends ([0-9.]+) ± [0-9.]+ nats below {own} ", text)
    assert float(gain) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("width", [128, 1024, 2048, 200])
def test_a_width_that_does_not_lie_between_is_an_error(width):
    with pytest.raises(UserError, match="verify_width"):
        sizes_between(PROXY, TARGET, width)
    assert sizes_between(PROXY, TARGET, 512)[0][0] == 512


def test_the_order_at_the_larger_size_chooses():
    """The proxy likes decay, and wider models do not."""
    search = FakeSearch(lambda config: config.weight_decay * (10 if config.width > 128 else -10))
    found = verified(search)
    assert found.best == replace(PROXY, weight_decay=0.0)
    assert not found.holds
    assert found.rank < -0.9
    assert "proxy_width" in found.text


def test_an_order_that_holds_is_said_to():
    found = verified(FakeSearch())
    assert found.holds
    assert found.rank > 0.9
    assert found.loss == pytest.approx(law(replace(PROXY, width=256, depth=6)), abs=3 * found.error)


def test_a_favourite_that_ties_at_the_proxy_and_loses_is_noticed():
    search = FakeSearch(lambda config: config.weight_decay * (10 if config.width > 128 else 0), noise=0.0)
    assert not verified(search, decays=(0.01, 0.0)).holds


def test_differences_within_the_noise_are_no_disorder():
    assert verified(FakeSearch(lambda config: 0.0, noise=0.01)).holds


def test_order_is_judged_on_the_seeds_that_both_have():
    """The first seed is easy at the larger size: those that got no other look better than they are, and the
    proxy's favourite, which got all, does not lose to them."""
    def quality(config):
        return config.weight_decay - 0.5 * (config.width > 128 and config.seed == 1)
    found = verified(FakeSearch(quality, noise=0.0))
    assert [len(each.rows) for each in found.found] == [3, 3, 2, 1, 1]
    assert found.found[0].rows[2]["val_loss"] > found.found[4].rows[0]["val_loss"] + 0.4
    assert found.holds
    assert found.rank == pytest.approx(1)


def test_a_choice_that_is_not_the_proxys_favourite_is_explained():
    """By less than noise: decay 0.01 leads at the larger size, decay 0 at the proxy."""
    def quality(config):
        return abs(config.weight_decay - 0.01 * (config.width > 128)) / 2
    found = verified(FakeSearch(quality, noise=0.0))
    assert found.holds and found.winner is not found.favourite
    assert "chosen: decay 0.01" in found.text
    assert "chosen: " not in verified(FakeSearch(noise=0.0)).text


def test_the_table_counts_the_seeds_of_each_mean():
    [row] = [line for line in verified(FakeSearch()).text.splitlines() if line.endswith("<- chosen")]
    assert re.findall(r"\((\d)\)", row) == ["2", "3"]


def test_candidates_are_tried_with_the_targets_context_batch_and_steps():
    target = replace(TARGET, context=128, batch=16, steps=80)
    search = FakeSearch(lambda config: config.weight_decay * (10 if config.context > 64 else -10))
    found = verified(search, target)
    wide = [config for config in search.trained if config.width > 128]
    assert {(config.context, config.batch, config.steps) for config in wide} == {(128, 16, 80)}
    assert found.best.context == 64
    assert not found.holds
    assert "context 128" in found.text


def test_few_get_many_seeds_and_the_plan_counts_them():
    """The plan counts an lr beyond those tried, which was not needed here."""
    search, sizes = FakeSearch(), sizes_between(PROXY, TARGET)
    found = verified(search)
    trained = [(config.width, config.depth) for config in dict.fromkeys(search.trained)]
    first, second = count_trainings(sizes, 5, 3)
    assert (trained.count(sizes[0]), trained.count(sizes[1])) == (first - 1, second)
    assert len(found.winner.rows) == 3
    assert sorted(len(each.rows) for each in found.found) == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("moved", [-0.3, 0.0, 0.4])
def test_the_shift_of_the_best_lr_is_stated(moved):
    def quality(config):
        x = np.log2(config.lr / PROXY.lr)
        return ((x - moved)**2 - x**2) / 5 if config.width > 128 else 0.0
    assert f"{moved:+.2f} octaves" in verified(FakeSearch(quality, noise=0.0), decays=(0.0, 0.01)).text


def test_what_diverges_or_fails_is_not_chosen():
    search = FakeSearch(lambda config: np.inf if config.weight_decay == 0.0 else config.weight_decay)
    assert verified(search).best.weight_decay == 0.01


@pytest.mark.parametrize("row_of", [
    lambda config: None, lambda config: {"val_loss": np.nan, "diverged": True},
    lambda config: {"val_loss": 3.0, "diverged": config.width > 128}])
def test_nothing_is_forecast_of_candidates_that_all_fail_or_diverge(row_of, tmp_path):
    search = FakeSearch()
    train = search.row_of
    search.row_of = lambda config: row_of(config) and train(config) | row_of(config)
    found = verified(search)
    assert found.forecast is None
    assert not found.holds
    assert "--space" in found.text
    found.draw(tmp_path)


def test_sizes_off_any_power_law_widen_the_interval():
    """As where a wide model learns in the middle of its training what a narrow one never does."""
    def size(bump):
        points = [(width, 4, 0, law(replace(PROXY, width=width)) + shift, 0.005)
                  for width, shift in ((64, 0), (128, 0), (256, bump), (384, 0))]
        low, _, high = forecast(points, (1024, 4), 0.01, 5)
        return high - low
    assert size(0.1) > 1.5 * size(0.0)


def test_the_forecast_holds_a_target_on_the_law():
    found = verified(FakeSearch())
    low, middle, high = found.forecast
    assert low < law(TARGET) < high
    assert high - low < 0.15
    assert len(found.points) == 4


def test_a_forecast_is_wider_of_fewer_sizes_and_of_more_noise():
    points = [(width, 4, 0, law(replace(PROXY, width=width)), 0.005) for width in (64, 128, 256)]
    def size(points, noise):
        low, _, high = forecast(points, (1024, 4), noise, 5)
        return high - low
    assert size(points[1:], 0.005) > size(points, 0.005)
    assert size(points, 0.05) > size(points, 0.005)


@pytest.mark.parametrize(("head_dim", "below"), [(64, (64, 4)), (128, None)])
def test_the_size_below_the_proxy_has_whole_heads(head_dim, below):
    proxy, target = replace(PROXY, head_dim=head_dim), replace(TARGET, head_dim=head_dim)
    assert size_below(proxy, target) == below


def test_the_figure_is_drawn(tmp_path):
    verified(FakeSearch()).draw(tmp_path)
    assert (tmp_path / "verify.png").stat().st_size > 10_000
