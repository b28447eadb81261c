import pytest
import torch

import natgrad
from natgrad.race.entries import ENTRIES, LOOK_UPS, find, with_policies
from natgrad.race.run import Rules, batches, run
from natgrad.race.tasks import Task

FIRST_ORDER = [name for name, entry in ENTRIES.items() if not entry.natural]


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.filterwarnings("ignore")
def test_each_first_order_entry_lowers_the_loss_with_its_defaults(tiny: Task, name: str) -> None:
    entry = ENTRIES[name]
    done = run(tiny, tiny.data(None), entry, settings=entry.defaults, seed=0, rules=Rules(3))
    assert done.stopped == "" and done.curve[-1].loss < done.curve[0].loss


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.filterwarnings("ignore")
def test_each_first_order_space_holds_settings_that_build(tiny: Task, name: str) -> None:
    import optuna

    entry = ENTRIES[name]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(3):
        entry.start(tiny.model(tiny.data(None)), tiny, {**entry.defaults, **entry.space(study.ask())}, 6)


def test_people_s_ways_with_adamw_and_muon_are_in_their_spaces() -> None:
    from optuna.trial import FixedTrial

    shared = {"weight_decay": 0.1, "schedule": "warmup-cosine"}
    adam = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, **shared}
    assert ENTRIES["adamw"].space(FixedTrial(adam)) == adam
    own = {"momentum": 0.95, "ends": False, **shared}
    two = {"adjust_lr_fn": "original", "lr": 0.02, "adam_lr": 3e-3, **own}
    one = {"adjust_lr_fn": "match_rms_adamw", "lr_of_both": 3e-3, **own}
    assert ENTRIES["muon"].space(FixedTrial(two)) == two
    found = ENTRIES["muon"].space(FixedTrial(one))
    assert found["lr"] == found["adam_lr"] == 3e-3 and "lr_of_both" not in found


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in FIRST_ORDER])
def test_each_natural_entry_lowers_the_loss_with_the_defaults_of_the_library(tiny: Task, name: str) -> None:
    done = run(tiny, tiny.data(None), ENTRIES[name], settings={}, seed=0, rules=Rules(3))
    assert done.stopped == "" and done.curve[-1].loss < done.curve[0].loss
    assert "damping" in done.epochs[-1].statistics


@pytest.mark.parametrize(("ends", "matrices"), [(True, 3), (False, 1)])
def test_muon_leaves_everything_but_the_chosen_matrices_to_adamw(tiny: Task, ends: bool, matrices: int) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    together = ENTRIES["muon"].build(model, tiny, {**ENTRIES["muon"].defaults, "ends": ends})
    by_muon, by_adam = (optimizer.param_groups[0]["params"] for optimizer in together.optimizers)
    assert len(by_muon) == matrices and len(by_muon) + len(by_adam) == 6


def test_a_policy_in_brackets_names_a_variant() -> None:
    assert find("kfac[kl]").defaults["step_size"] == "kl"
    assert [e.name for e in with_policies("kfac", ["default", "kl"])] == ["kfac", "kfac[kl]"]
    assert [e.name for e in with_policies("sgd", ["default", "kl"])] == ["sgd"]


@pytest.mark.parametrize("name", ["adan", "kfac[fast]", "sgd[kl]"])
def test_an_unknown_name_says_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match="there are"):
        find(name)


def test_an_entry_may_have_a_policy_of_its_own_which_brackets_override(tiny: Task) -> None:
    for name, policy in (("woodbury", natgrad.KLLimit), ("woodbury[constant]", natgrad.Constant)):
        entry = find(name)
        assert isinstance(entry.build(tiny.model(tiny.data(None)), tiny, entry.defaults).step_size, policy)


@pytest.mark.parametrize("name", ["fngd", "fngd[scalar]", "fngd[sample]", "fngd[quantile]", "fngd[recompute]"])
def test_fngd_learns_for_an_epoch_by_each_of_its_rules(tiny: Task, name: str) -> None:
    entry = find(name)
    done = run(tiny, tiny.data(None), entry, settings=entry.defaults, seed=0, rules=Rules(3))
    assert done.stopped == "" and done.curve[-1].loss < done.curve[0].loss
    optimizer = entry.start(tiny.model(tiny.data(None)), tiny, {**entry.defaults, "schedule": "cosine"}, 6)
    rule = name.removeprefix("fngd").strip("[]") or "position_mean"
    assert (optimizer.coefficients, optimizer.first_phase) == (LOOK_UPS[rule](), 6)


@pytest.mark.parametrize("name", ["fngd[mean]", "fngd[kl]"])
def test_an_unknown_variant_of_fngd_is_told_those_there_are_and_policies_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"there are scalar, sample, quantile, recompute$"):
        find(name)


def test_batches_say_which_examples_they_have() -> None:
    x = torch.arange(10.0)
    dealt = list(batches((x, 2 * x), 3, torch.Generator()))
    assert [len(ids) for _, _, ids in dealt] == [3, 3, 3]
    assert all(torch.equal(here, x[ids]) and torch.equal(y, 2 * x[ids]) for here, y, ids in dealt)
    kept = list(batches((x, 2 * x), 3, torch.Generator(), keep_last=True))
    assert [len(ids) for _, _, ids in kept] == [3, 3, 3, 1] and sorted(torch.cat([c for *_, c in kept])) == list(
        range(10)
    )
