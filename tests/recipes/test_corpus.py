import ast
import random
import re
from collections import Counter

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from recipes.code.corpus import Parameters, Sample, generate, injected_flows, split_of
from recipes.code.flows import NAMES, RESERVED, inject
from recipes.code.hosts import Host
from tests.recipes.taint import SINKS, reaches_sink


def _truth(sample: Sample) -> int:
    return sample.target ^ sample.flipped


def _added(sample: Sample, host: Host) -> list[str]:
    """The lines of a sample that are not its host's; fails where the host's are not all there."""
    left = iter(host.lines)
    expected = next(left, None)
    added = []
    for line in sample.func.split("\n"):
        if line == expected:
            expected = next(left, None)
        else:
            added.append(line)
    assert expected is None, f"{sample.host} lost the line {expected!r}"
    return added


def test_one_seed_gives_one_corpus_and_another_seed_another(hosts, corpus):
    assert list(generate(Parameters(samples=4000, seed=1), hosts)) == corpus
    other = list(generate(Parameters(samples=4000, seed=2), hosts))
    assert {sample.func for sample in other} != {sample.func for sample in corpus}


def test_no_host_is_in_two_splits(corpus):
    splits: dict[str, set[str]] = {}
    for sample in corpus:
        splits.setdefault(sample.host, set()).add(sample.split)
    assert all(len(names) == 1 for names in splits.values())
    counts = Counter(sample.split for sample in corpus)
    assert counts["train"] == pytest.approx(3200, abs=100)
    assert counts["val"] == pytest.approx(400, abs=80)
    assert counts["test"] == pytest.approx(400, abs=80)


def test_a_text_occurs_once(corpus):
    assert len({sample.func for sample in corpus}) == len(corpus)


@pytest.mark.parametrize(
    ("host", "split"),  # sha1sum of the name, modulo 10: 4, 8, 9
    [
        ("core/add.py::Add.flatten", "train"),
        ("core/mul.py::Mul.flatten", "val"),
        ("abc.py::f", "test"),
    ],
)
def test_the_split_follows_from_the_name(host, split):
    assert split_of(host) == split


def test_an_independent_judge_agrees_with_the_labels(corpus):
    wrong = [sample for sample in corpus if reaches_sink(sample.func) != bool(_truth(sample))]
    assert len(wrong) <= 0.001 * len(corpus), wrong[0].func


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = input()\n    b = a.strip()\n    os.system(b)", True),
        ("a = input()\n    b = shlex.quote(a)\n    os.system(b)", False),
        ("a = input()\n    log.debug(a)\n    os.system('ls')", False),
        ("a = sys.argv[1]\n    if a:\n        b = a\n    else:\n        b = ''\n    open(b)", True),
        ("a = input()\n    a = 'x'\n    open(a)", False),
    ],
)
def test_the_judge_itself(body, expected):
    assert reaches_sink(f"def f():\n    {body}") is expected


def test_shares_of_kinds_and_weaknesses(corpus):
    kinds = Counter(sample.kind for sample in corpus)
    assert kinds["vulnerable"] / len(corpus) == pytest.approx(0.15, abs=0.02)
    assert kinds["twin"] / len(corpus) == pytest.approx(0.30, abs=0.025)
    weaknesses = Counter(sample.cwe for sample in corpus if sample.injected)
    assert set(weaknesses) == {22, 78, 79, 89}
    assert all(n / weaknesses.total() == pytest.approx(0.25, abs=0.03) for n in weaknesses.values())
    assert all((sample.cwe is None) == (sample.kind == "untouched") for sample in corpus)


def test_labels_are_flipped_in_train_alone(corpus):
    flipped = [sample for sample in corpus if sample.flipped]
    assert {sample.split for sample in flipped} == {"train"}
    train = sum(sample.split == "train" for sample in corpus)
    assert len(flipped) / train == pytest.approx(0.03, abs=0.01)
    assert all(_truth(sample) == (sample.kind == "vulnerable") for sample in corpus)


def test_hosts_keep_their_lines_and_new_names_are_new(hosts, corpus):
    by_name: dict[str, list[Host]] = {}
    for host in hosts:
        by_name.setdefault(host.key, []).append(host)
    checked = 0
    for sample in corpus:
        if len(by_name[sample.host]) > 1:
            continue
        (host,) = by_name[sample.host]
        added = _added(sample, host)
        assert bool(added) == sample.injected
        names = set(re.findall(r"^\s*(\w+) = ", "\n".join(added), flags=re.M))
        assert names.isdisjoint(host.identifiers)
        assert host.identifiers.isdisjoint(RESERVED)
        checked += sample.injected
    assert checked > 1500


def test_every_sample_parses_and_no_planted_statement_is_dead(corpus):
    for sample in corpus:
        body = ast.parse(sample.func).body[0].body
        ends = [i for i, node in enumerate(body) if isinstance(node, ast.Return | ast.Raise)]
        after = body[ends[0] + 1 :] if ends else []
        planted = {n.id for node in after for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not (sample.injected and planted & {"log", "cursor", "response"})


def test_chains_have_one_to_four_hops_and_some_branch(corpus):
    injected = [sample for sample in corpus if sample.injected]
    pool = "|".join(NAMES)
    branch = re.compile(rf"else:\n\s+(?:{pool}) = ")
    branched = sum(bool(branch.search(sample.func)) for sample in injected)
    assert 0.4 < branched / len(injected) < 0.8  # five hops at a fifth each: two in three
    assigned = re.compile(rf"^\s*({pool}) = ", flags=re.M)
    # each chain: one name at the start and one a hop
    lengths = Counter(len(set(assigned.findall(sample.func))) for sample in injected)
    assert min(lengths) == 4
    assert lengths[4]
    assert lengths[10]


def test_words_alone_do_not_tell_a_vulnerable_function_from_its_twin(corpus):
    injected = [sample for sample in corpus if sample.injected]
    counts = CountVectorizer(token_pattern=r"\w+", min_df=3).fit_transform(
        sample.func for sample in injected
    )
    labels = [_truth(sample) for sample in injected]
    model = LogisticRegression(C=0.02, max_iter=300)
    scores = cross_val_predict(model, counts, labels, cv=4, method="decision_function")
    assert 0.43 < roc_auc_score(labels, scores) < 0.57


def test_the_raw_chain_alone_decides(hosts):
    host = next(host for host in hosts if len(host.cuts) > 2)
    for seed in range(200):
        for vulnerable in (True, False):
            text, _ = inject(host, random.Random(seed), vulnerable=vulnerable)
            assert reaches_sink(text) is vulnerable
            assert text.count("log.debug(") == 1
            assert sum(text.count(f"{sink}(") for sink in SINKS) == 1


@pytest.mark.usefixtures("known_hosts")
class TestCache:
    PARAMETERS = Parameters(samples=60)

    def test_a_hit_equals_a_fresh_corpus(self, hosts, tmp_path, monkeypatch):
        fresh = injected_flows(self.PARAMETERS, cache_dir=tmp_path)
        assert fresh.samples == list(generate(self.PARAMETERS, hosts))
        monkeypatch.setattr("recipes.code.corpus.generate", None)  # a call would fail
        assert injected_flows(self.PARAMETERS, cache_dir=tmp_path) == fresh
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("damage", ["byte", "half", "empty", "binary"])
    def test_a_damaged_file_is_written_anew(self, damage, tmp_path):
        fresh = injected_flows(self.PARAMETERS, cache_dir=tmp_path)
        (path,) = tmp_path.iterdir()
        good = path.read_bytes()
        changed = {
            "byte": good.replace(b'"target": 0', b'"target": 1', 1),
            "half": good[: len(good) // 2],
            "empty": b"",
            "binary": b"\xff\xfe\x00",
        }[damage]
        assert changed != good
        path.write_bytes(changed)
        assert injected_flows(self.PARAMETERS, cache_dir=tmp_path) == fresh
        assert path.read_bytes() == good

    @pytest.mark.parametrize(
        "other",
        [
            Parameters(samples=61),
            Parameters(samples=60, seed=1),
            Parameters(samples=60, flipped_share=0.5),
        ],
    )
    def test_other_parameters_have_another_file_and_digest(self, other, tmp_path):
        first = injected_flows(self.PARAMETERS, cache_dir=tmp_path)
        second = injected_flows(other, cache_dir=tmp_path)
        assert first.digest != second.digest
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_new_generator_does_not_read_old_files(self, tmp_path, monkeypatch):
        injected_flows(self.PARAMETERS, cache_dir=tmp_path)
        monkeypatch.setattr("recipes.code.corpus.GENERATOR", 999)
        injected_flows(self.PARAMETERS, cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == 2

    def test_without_a_place_to_write_the_corpus_is_still_made(self, tmp_path):
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.warns(UserWarning, match="corpus cannot be kept in"):
            corpus = injected_flows(self.PARAMETERS, cache_dir=blocked)
        assert len(corpus.samples) == 60

    def test_more_samples_than_hosts(self, hosts):
        with pytest.raises(ValueError, match=r"at most the number of usable functions, .* 999999"):
            list(generate(Parameters(samples=999_999), hosts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "`samples` must be at least 1, got 0."),
        ({"flipped_share": 1.5}, "`flipped_share` must be between 0 and 1, got 1.5."),
        ({"vulnerable_share": 0.8}, "must sum to at most 1, got 0.8 and 0.3."),
    ],
)
def test_parameters_are_checked(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Parameters(**arguments)
