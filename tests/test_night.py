"""What a night decides, as functions of given records: which checkpoints, what is worse, what may be promoted."""

import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.nights import shift
from orchestrator.nights.decisions import (
    CanaryResult,
    ModelComparison,
    ModelNumbers,
    Night,
    NightFinding,
    Verdict,
    compare,
    decide_promotions,
    find_drifted,
    find_due,
    find_earlier_entries,
    find_regressions,
    judge,
    select,
)
from orchestrator.nights.night_page import format_headline, to_html, to_markdown
from orchestrator.nights.suite import Hooks, Rule, Suite
from orchestrator.tracking.registry import Version
from workers.config import Mistake
from workers.seals import open_json
from workers.storage import Storage

DAY = date(2026, 3, 1)

NLL = Rule(metric="eval/nll_bpd", standard_errors=3)
DISTANCE = Rule(metric="eval/fd_classifier", standard_errors=3)
SUITE = Suite.model_validate(
    {
        "name": "small",
        "models": ["*@champion", "*@candidate", "*@newest"],
        "schedule": {"at": "02:30", "zone": "UTC"},
        "regression": {"rules": [r.model_dump() for r in (NLL, DISTANCE)]},
    }
)
HARD = 2.5 + np.random.RandomState(0).randn(50)  # what an image costs under any model


def version(sweep: str, number: int, *aliases: str, **tags: str) -> Version:
    tags = {
        "trial": "t",
        "checkpoint": f"c{number}",
        "path": f"trials/t/checkpoints/{number}",
        "storage": "here",
    } | tags
    return Version(sweep, number, aliases, **tags)


def entry(name: str, checkpoint: str, worse: float = 0.0, **changes: Any) -> ModelNumbers:
    """Measured `worse` bits/dim above the others, image by image but for a little noise of the checkpoint's own."""
    nll = HARD + worse + 0.01 * np.random.RandomState(sum(map(ord, checkpoint))).randn(len(HARD))
    sweep, _, alias = name.partition("@")
    metrics = {"eval/nll_bpd": float(nll.mean()), "eval/fd_classifier": 0.5 + worse, "eval/fd_classifier_se": 0.02}
    passports = {kind: {"protocol": {"images": 50}} for kind in ("nll", "samples")}
    content: dict[str, Any] = {
        "name": name, "sweep": sweep, "alias": alias, "version": 1, "checkpoint": checkpoint, "protocol": "p",
        "hash": f"hash of {checkpoint}", "metrics": metrics, "passports": passports, "nll_per_image": tuple(nll),
    }  # fmt: skip
    return ModelNumbers(**(content | changes))


def night(day: str, *entries: ModelNumbers, **changes: Any) -> Night:
    content: dict[str, Any] = {"suite": "small", "day": date.fromisoformat(day), "schedule": "02:30 UTC", "zone": "UTC",
               "started": f"{day} 02:30:00+00:00", "entries": entries}  # fmt: skip
    return Night(**(content | changes))


def verdicts(comparisons: list[ModelComparison]) -> dict[tuple[str, str, str], Verdict]:
    return {(c.model, c.against.partition(" (")[0], c.metric): c.verdict for c in comparisons}


# ---- Which checkpoints are due ---------------------------------------------------------------------------------


def test_star_names_every_sweep_that_has_the_alias_and_newest_the_last_version() -> None:
    registry = [version("a", 1, "champion"), version("a", 2, "candidate"), version("b", 1), version("b", 2)]
    wanted, notes, problems = select(["*@champion", "*@newest"], registry)
    assert {w.name: w.version.number for w in wanted if w.version} == {"a@champion": 1, "a@newest": 2, "b@newest": 2}
    assert problems == [] and len(notes) == 1 and "b has no alias 'champion'" in notes[0]


def test_what_is_named_and_not_there_is_a_mistake_each_told_with_what_there_is() -> None:
    registry = [version("beta", 1, "candidate"), version("other", 1, path="")]
    asked = ["bta@champion", "beta@champion", "beta@canddate", "other@newest", "53964d91"]
    wanted, notes, problems = select(asked, registry)
    assert [w.name for w in wanted] == ["53964d91"] and wanted[0].version is None and notes == []
    assert "did you mean 'beta'" in problems[0] and "registered: beta, other" in problems[0]
    assert "beta has no alias 'champion'" in problems[1] and "set: candidate (version 1)" in problems[1]
    assert "did you mean 'candidate'" in problems[2] and "orchestrator.path" in problems[3]


def test_an_empty_registry_is_told() -> None:
    assert select(["*@champion"], [])[:1] == ([],) and "no model is registered" in select(["*@champion"], [])[1][0]


def test_due_is_what_is_not_measured_once_a_checkpoint() -> None:
    asked = {"a@champion": "one", "a@candidate": "two", "a@newest": "two", "b@newest": "three"}
    assert find_due(asked, {"one"}) == {"two": ["a@candidate", "a@newest"], "three": ["b@newest"]}
    assert find_due(asked, {"one", "two", "three", "four"}) == {}


# ---- Comparing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "difference", "se", "expected"),
    [
        ({"standard_errors": 3}, 0.31, 0.1, "worse"),
        ({"standard_errors": 3}, 0.29, 0.1, "same"),
        ({"standard_errors": 3}, -0.31, 0.1, "better"),
        ({"standard_errors": 3}, 0.31, None, "unknown"),
        ({"relative": 0.1}, 0.21, None, "worse"),
        ({"relative": 0.1}, -0.19, None, "same"),
        ({"relative": 0.1, "standard_errors": 3}, 0.21, 0.1, "same"),  # beyond both, or it is none
        ({"relative": 0.1, "standard_errors": 1}, 0.21, 0.1, "worse"),
    ],
)
def test_worse_is_beyond_every_bound(rule: dict[str, float], difference: float, se: float, expected: str) -> None:
    assert judge(Rule(metric="eval/nll_bpd", **rule), 2.0, difference, se) == expected


def test_pairs_of_images_tell_what_the_models_own_errors_could_not() -> None:
    """Images differ by 1 bit/dim, models by 0.02."""
    [c] = compare([NLL], [entry("a@champion", "x"), entry("a@candidate", "y", 0.02)], {})
    assert c.verdict == "worse" and c.difference == pytest.approx(0.02, abs=0.01)
    assert c.standard_error is not None and c.standard_error < 0.01 < HARD.std() / 50**0.5


def test_a_bound_of_a_single_image_has_no_error_to_judge_by() -> None:
    single = [entry(name, name[0], worse, nll_per_image=(3.0 + worse,)) for name, worse in (("a@x", 0.1), ("b@y", 0.0))]
    [found] = compare([NLL], [single[0]], {"a@x": (night("2026-01-01"), single[1])})
    assert found.verdict == "unknown" and "without an error" in found.why


def test_a_model_is_held_against_itself_last_night_and_against_its_own_champion() -> None:
    before = find_earlier_entries([night("2026-03-01", entry("a@candidate", "x"), entry("a@champion", "w"))])
    tonight = [entry("a@champion", "w"), entry("a@candidate", "y", 0.3), entry("b@candidate", "z")]
    found = compare([NLL, DISTANCE], tonight, before)
    assert verdicts(found) == {
        ("a@champion", "last night", "eval/nll_bpd"): "same",
        ("a@champion", "last night", "eval/fd_classifier"): "same",
        ("a@candidate", "last night", "eval/nll_bpd"): "worse",
        ("a@candidate", "last night", "eval/fd_classifier"): "worse",
        ("a@candidate", "a@champion", "eval/nll_bpd"): "worse",
        ("a@candidate", "a@champion", "eval/fd_classifier"): "worse",
    }
    assert "the same numbers to the bit" in found[0].why
    alarms = find_regressions(SUITE, tonight, found)
    assert len(alarms) == 4 and all(f.alarm and f.model == "a@candidate" for f in alarms)
    alone = SUITE.model_copy(update={"regression": SUITE.regression.model_copy(update={"against": ("champion",)})})
    assert len(find_regressions(alone, tonight, found)) == 2


def test_the_newest_need_not_be_as_good_as_the_champion() -> None:
    tonight = [entry("a@champion", "w"), entry("a@newest", "y", 0.3)]
    found = compare([NLL], tonight, {})
    assert [c.verdict for c in found] == ["worse"] and find_regressions(SUITE, tonight, found) == []


def test_other_protocols_are_not_compared() -> None:
    other = {"nll": {"protocol": {"images": 30}}, "samples": {"protocol": {"images": 50}}}
    before = find_earlier_entries([night("2026-03-01", entry("a@candidate", "x", passports=other))])
    nll, distance = compare([NLL, DISTANCE], [entry("a@candidate", "y", 0.5)], before)
    assert nll.verdict == "unknown" and "nll images: 50 against 30" in nll.why
    assert distance.verdict == "worse"


def test_a_model_in_continuous_time_is_judged_by_the_rule_of_its_own_bound() -> None:
    """A suite over both kinds of models has a rule for each, and one is not unknown for want of the other's bound."""
    continuous = Rule(metric="eval/continuous_nll_bpd", standard_errors=3)

    def flow(checkpoint: str, worse: float = 0.0, name: str = "f@candidate") -> ModelNumbers:
        own = entry(name, checkpoint, worse)
        metrics = {n.replace("eval/nll", "eval/continuous_nll"): value for n, value in own.metrics.items()}
        return own.model_copy(update={"metrics": metrics})

    before = find_earlier_entries([night("2026-03-01", entry("a@candidate", "x"), flow("x"))])
    found = verdicts(compare([NLL, continuous], [entry("a@candidate", "y", 0.5), flow("y", 0.5)], before))
    assert found == {
        ("a@candidate", "last night", "eval/nll_bpd"): "worse",
        ("f@candidate", "last night", "eval/continuous_nll_bpd"): "worse",
    }
    champion, better = flow("x", name="f@champion"), flow("y", -0.5)
    of = [champion, better]
    [promotion] = decide_promotions(of, compare([NLL, continuous], of, {}), drift=False)
    assert promotion.promoted and "continuous_nll_bpd" in to_markdown(night("2026-03-02", *of))


def test_a_metric_that_is_no_number_is_worse() -> None:
    before = find_earlier_entries([night("2026-03-01", entry("a@candidate", "x"))])
    broken = entry("a@candidate", "y", metrics={"eval/nll_bpd": math.nan})
    [c] = compare([NLL], [broken], before)
    assert c.verdict == "worse" and "nan" in c.why


def test_numbers_that_nobody_believed_or_that_are_not_there_are_no_base() -> None:
    good, failed = entry("a@candidate", "x"), ModelNumbers(name="a@candidate", failed="gone")
    history = [
        night("2026-03-04", entry("a@candidate", "z"), state="not believed"),
        night("2026-03-03", failed, state="incomplete"),
        night("2026-03-02", good),
        night("2026-03-01", entry("a@candidate", "w")),
    ]
    then, found = find_earlier_entries(history)["a@candidate"]
    assert (then.day, found) == (date(2026, 3, 2), good)


# ---- Drift -----------------------------------------------------------------------------------------------------


def moved(factor: float, **changes: Any) -> list[NightFinding]:
    """Of one checkpoint, measured again with a distance that is `factor` times what it was."""
    last = entry("a@champion", "x")
    metrics = {**last.metrics, "eval/fd_classifier": last.metrics["eval/fd_classifier"] * factor}
    tonight = last.model_copy(update={"metrics": metrics, "hash": "another", **changes})
    before = find_earlier_entries([night("2026-03-01", last, versions={"torch": "2.13.0", "ray": "2.60.0"})])
    assert find_regressions(SUITE, [tonight], compare([NLL, DISTANCE], [tonight], before)) == []  # one alarm is enough
    return find_drifted([tonight], before, {"torch": "2.14.0", "ray": "2.60.0"})


def test_an_unchanged_checkpoint_with_another_hash_is_a_finding_with_what_changed() -> None:
    [finding] = moved(1.01)
    assert finding.alarm and "fd_classifier 0.5 -> 0.505" in finding.text and "torch 2.13.0 -> 2.14.0" in finding.text
    [finding] = moved(1 + 1e-7)
    assert not finding.alarm and "within rounding" in finding.text


def test_another_feature_space_is_drift_and_another_protocol_or_checkpoint_is_none() -> None:
    other = {"nll": {"protocol": {"images": 50}}, "samples": {"protocol": {"images": 50, "features_digest": "n"}}}
    [finding] = moved(1.0, passports=other)
    assert finding.alarm and "samples features_digest: n against None" in finding.text
    assert moved(1.01, checkpoint="y") == moved(1.01, protocol="q") == []


# ---- Promotion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worse", "distance", "promoted", "told"),
    [
        (-0.1, 0.0, True, "clearly better"),
        (-0.1, 0.1, False, "not clearly better"),  # better in one, worse in the other
        (0.0, 0.0, False, "not clearly better"),
        (0.1, -0.2, False, "not clearly better"),
        (0.0, -0.1, True, "clearly better"),
    ],
)
def test_only_a_clear_improvement_is_promoted(worse: float, distance: float, promoted: bool, told: str) -> None:
    champion, candidate = entry("a@champion", "x"), entry("a@candidate", "y", worse)
    metrics = {**candidate.metrics, "eval/fd_classifier": 0.5 + distance}
    tonight = [champion, candidate.model_copy(update={"metrics": metrics, "version": 2})]
    found = compare([NLL, DISTANCE], tonight, {})
    [decided] = decide_promotions(tonight, found, drift=False)
    assert (decided.promoted, decided.version) == (promoted, 2) and told in decided.why
    assert not decide_promotions(tonight, found, drift=True)[0].promoted


def test_what_cannot_be_compared_is_not_promoted() -> None:
    champion, better = entry("a@champion", "x"), entry("a@candidate", "y", -0.5)
    other = {**better.passports, "samples": {"protocol": {"images": 9}}}
    cases = {
        "not everything could be compared": [champion, better.model_copy(update={"passports": other})],
        "a has no champion": [better],
        "a@champion was not measured": [
            ModelNumbers(name="a@champion", sweep="a", alias="champion", failed="gone"), better,
        ],
        "the candidate is the champion": [champion, champion.model_copy(update={"name": "a@candidate",
                                                                                "alias": "candidate"})],
    }  # fmt: skip
    for why, tonight in cases.items():
        [decided] = decide_promotions(tonight, compare([NLL, DISTANCE], tonight, {}), drift=False)
        assert not decided.promoted and why in decided.why


# ---- The record and the report ---------------------------------------------------------------------------------


def test_the_status_is_that_of_the_worst() -> None:
    fine, failed = entry("a@champion", "x"), ModelNumbers(name="b@champion", failed="gone")
    note, alarm = NightFinding(kind="note", text="n"), NightFinding(kind="regression", text="r", alarm=True)
    assert night("2026-03-01", fine, findings=(note,)).status == 0
    assert night("2026-03-01", fine, failed, findings=(note,)).status == 1
    assert night("2026-03-01", fine, failed, findings=(note, alarm)).status == 3


def test_a_night_is_read_as_it_was_written() -> None:
    last = night("2026-03-01", entry("a@champion", "x", metrics={"eval/nll_bpd": 2.5, "eval/kid": math.inf}))
    assert Night.model_validate_json(last.model_dump_json()) == last


def test_the_report_says_the_night_in_both_forms_and_needs_nothing_beside_it() -> None:
    tonight = [entry("a@champion", "w"), entry("<b>@candidate", "y", 0.3)]
    history = [night("2026-02-26", entry("a@champion", "v", 0.4))]
    found = compare([NLL], tonight, find_earlier_entries(history))
    off = CanaryResult(name="gaussian/nll_bpd", measured=7.5, expected=6.9, tolerance=0.03, passed=False)
    last = night(
        "2026-03-01", *tonight, comparisons=tuple(found), previous=date(2026, 2, 26), rules=(str(NLL),),
        missed=(date(2026, 2, 27), date(2026, 2, 28)), canaries=(off,), versions={"torch": "2.13.0"},
        findings=(NightFinding(kind="regression", model="<b>@candidate", text="worse", alarm=True),),
    )  # fmt: skip
    page, text = to_html(last, history), to_markdown(last)
    for output in (
        "due at 02:30 UTC", "2 missed nights as well: 2026-02-27 to 2026-02-28",
        "Compared with the night of 2026-02-26",
        "gaussian/nll_bpd: 7.5, expected 6.9", "fd_classifier", "torch 2.13.0", "alarm",
    ):  # fmt: skip
        assert output in page and output in text
    assert "<b>@candidate" in text and "<b>" not in page and "&lt;b&gt;@candidate" in page
    assert "<svg" in page and "<script" not in page and "src=" not in page
    assert "alarm. regression: <b>@candidate: worse" in format_headline(last)


# ---- Keeping it before anybody is told -------------------------------------------------------------------------


def opened(content: bytes) -> Night:
    """A night's result.json."""
    return Night.model_validate_json(json.dumps(open_json(content, f"nightly/small/{DAY}/result.json")))


def test_a_night_is_kept_before_its_hooks_are_called_and_they_are_called_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow is away at first: what a hook saw was there, its failure is in the report, and it is not called again."""
    place, heard, reached = tmp_path / "runs/nightly/small" / str(DAY), tmp_path / "heard", list[bool]()
    script = f"cat {place}/result.json >> {heard}; printf 'gr\\374n\\n'; exit 1"
    suite = SUITE.model_copy(update={"hooks": Hooks(command=("/bin/sh", "-c", script))})
    alarmed = night(str(DAY), findings=(NightFinding(kind="canary", text="off", alarm=True),))
    monkeypatch.setattr(shift, "_work_night", lambda *_: alarmed)

    def record(*_: object, **__: object) -> tuple[str, str]:
        if not reached:
            raise Mistake("MLflow cannot be reached")
        return "http://here", ""

    monkeypatch.setattr(shift, "record_night", record)
    with pytest.raises(Mistake, match="cannot be reached"):
        shift.run(suite, DAY, str(tmp_path / "runs"), None)
    kept = opened(heard.read_bytes())
    assert (kept.told, kept.recorded, kept.status) == (False, False, 3)
    told = "hook: the command failed: /bin/sh ended with status 1: gr\ufffdn"
    assert told in (place / "report.md").read_text()
    reached.append(True)
    for _ in range(2):
        monkeypatch.setattr(shift, "_work_night", None)  # it is done
        assert shift.run(suite, DAY, str(tmp_path / "runs"), None) == 3
    kept = opened((place / "result.json").read_bytes())
    assert (kept.told, kept.recorded) == (True, True) and told in map(str, kept.findings)
    assert opened(heard.read_bytes())  # once, so that it is one record


def test_a_night_whose_hooks_were_cut_off_calls_them_at_the_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tmp_path / "heard"
    suite = SUITE.model_copy(update={"hooks": Hooks(command=("/bin/sh", "-c", f"echo called >> {heard}"))})
    cut = night(str(DAY), findings=(NightFinding(kind="canary", text="off", alarm=True),), told=False, recorded=True)
    storage = Storage(tmp_path)
    storage.write_sealed(f"nightly/small/{DAY}/result.json", json.loads(cut.model_dump_json()))
    monkeypatch.setattr(shift, "record_night", lambda *_, **__: ("http://here", ""))
    for _ in range(2):
        assert shift.run(suite, DAY, str(tmp_path), None) == 3
    assert heard.read_text() == "called\n"
