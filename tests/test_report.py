"""The report without a browser: what it holds, what it refuses, and that what a model wrote stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powermc import ArgumentError, ModelError, PowermcError, Run, power_sample
from powermc.cli.report import report as command
from powermc.report import page, write
from powermc.report.build import _json
from powermc.report.data import report
from powermc.report.packing import UNKNOWN, alphabet, pack_scores, short
from powermc.report.walk import ABANDONED, MOVED, NULL, SAME, STAGE1, TURNED_DOWN, outcomes
from tests.fake_lm import FakeLM
from tests.runs import ODD, made_up


def unpacked(text: str, size: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=f"<u{size}")


def rebuilt(data, run_block) -> list[tuple[tuple | None, tuple | None]]:
    """What the page makes of a chain: (path before, path after) of every step, as pieces; None where not known."""
    tokens, lengths = unpacked(data["tails"], run_block["bytes"]), iter(np.cumsum([0, *data["lengths"]]))
    starts = dict(zip(data["starts"], data["startKeep"], strict=True))
    last: tuple = ()
    found, before, steps = None, next(lengths), []

    def following(keep):
        nonlocal last, before
        end = next(lengths)
        tail, before = tokens[before:end], end
        if keep is None:
            return None
        last = (*last[:keep], *(run_block["pieces"][i] for i in tail))
        return last

    for step, keep in enumerate(data["keep"]):
        if step in starts:
            found = following(starts[step])
        old = found
        found = following(keep)
        steps.append((old, found))
    return steps


@pytest.mark.parametrize("thin", [1, 3])
def test_paths_survive_packing(thin):
    """Every path that was kept is there, and every path that a step set out from, growth between blocks included."""
    run = made_up(prompts=2, chains=2, steps=40, blocks=4, thin=thin)
    found = report(run)
    for (p, c), data in found.chains.items():
        chain = run.chains[p][c]

        def pieces(path):
            return None if path is None else tuple(run.pieces[t] for t in path.tokens)

        for step, (before, after) in enumerate(rebuilt(data, found.run)):
            if chain.history[step] is not None:
                assert after == pieces(chain.history[step])
            elif run.infos[p]["changed"][c, step]:
                assert after is None  # thinned away, and nothing else tells
            if step in (0, 10, 20, 30):
                assert before == pieces(chain.starts[step // 10])
            elif chain.history[step - 1] is not None:
                assert before == pieces(chain.history[step - 1])
        lengths = np.array(data["proposalLengths"])
        assert len(unpacked(data["proposals"], found.run["bytes"])) == lengths[lengths > 0].sum()
        moved = run.infos[p]["changed"][c]
        assert (lengths[moved] == -1).all()  # what was accepted is in the paths


def test_scores_are_those_of_the_paths():
    run = made_up(chains=1, steps=10, blocks=1)
    data = report(run).chains[0, 0]
    start = run.chains[0][0].starts[0]
    scores = unpacked(data["scores"], 2)[: len(start)]
    assert scores / 1000 == pytest.approx(-start.log_p, abs=6e-4)


def test_scores_that_are_unknown_or_out_of_range():
    log_p = np.array([np.nan, -np.inf, -70.0, -0.0, -1.2345, 1e-9])
    assert unpacked(pack_scores(log_p), 2).tolist() == [UNKNOWN, UNKNOWN - 1, UNKNOWN - 1, 0, 1234, 0]


def test_a_large_vocabulary_takes_four_bytes():
    ids = np.arange(70_000)
    letters = alphabet(ids.tolist(), {})
    assert letters.bytes == 4
    assert unpacked(letters.pack(ids[[69_999, 3]]), 4).tolist() == [69_999, 3]
    assert letters.pieces[5] == "#5 "


def test_outcomes_cover_every_step():
    run = made_up(chains=4, steps=100)
    info = run.infos[0]
    for c in range(4):
        found = outcomes(info, c, 100)
        assert ((found == MOVED) == info["changed"][c]).all()
        assert ((found == SAME) == (info["accepted"][c] & ~info["changed"][c])).all()
        assert ((found == ABANDONED) == info["abandoned"][c]).all()
        assert ((found == NULL) == info["null"][c]).all()
        stopped = np.isin(found, (STAGE1, TURNED_DOWN))
        assert (found[stopped & (info["component"][c] == 1)] == TURNED_DOWN).all()
        assert {MOVED, SAME, STAGE1, TURNED_DOWN, ABANDONED, NULL} == set(found.tolist())


@given(st.dictionaries(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=3), max_size=3))
def test_json_is_only_text_to_an_html_parser(data):
    text = _json(data)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_numbers_that_json_cannot_hold():
    assert [short(x) for x in (float("nan"), float("inf"), -float("inf"), True, 1.23456, 7)] == [
        *(None, "inf", "-inf", 1, 1.235, 7)
    ]


def test_the_policy_names_the_two_scripts_of_the_page():
    html = page(made_up(steps=10))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "connect-src" not in policy
    assert "unsafe-eval" not in policy
    scripts = re.findall(r'<script(?: type="text/plain" id="plotly-source")?>(.*?)</script>', html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(hashes) == 2
    assert re.findall(r"sha256-([^&]+)&", policy) == hashes
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html[: html.index('id="plotly-source"')])


def test_the_same_run_gives_the_same_file():
    run = made_up(steps=10)
    assert page(run) == page(run)


def test_text_that_is_not_unicode_leaves_the_prompt_out_of_the_configuration():
    run = made_up(steps=10)
    odd = replace(run, prompts=(replace(run.prompts[0], text="a \ud800 b"),))
    assert "without the prompts" in report(odd).text["configuration_hint"]
    assert "prompt =" not in report(odd).text["configuration"]
    assert "prompt =" in report(run).text["configuration"]


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_have_a_report_too(name, tmp_path):
    write(ODD[name](), tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size > 1e6


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot write the report .*no/such/run\.html: No such file or directory"):
        made_up(steps=10).report(tmp_path / "no/such/run.html")


def test_a_store_has_the_report_of_its_run(tmp_path):
    """From a file with the rejected proposals, the page is that of the run in memory; without, it is shorter."""
    small = {"max_new_tokens": 12, "block_size": 4, "steps": 6, "chains": 2, "alpha": 2.0}
    run = power_sample(FakeLM(), ["a", "b"], **small, store=tmp_path / "full.db")
    stored, found = report(Run.load(tmp_path / "full.db")), report(run)
    assert stored.chains == found.chains
    assert stored.prompts == found.prompts
    power_sample(FakeLM(), ["a", "b"], **small, store=tmp_path / "lean.db", keep_proposals=False)
    lean = report(Run.load(tmp_path / "lean.db"))
    assert {key: data["keep"] for key, data in lean.chains.items()} == {k: d["keep"] for k, d in found.chains.items()}
    assert max(max(data["proposalLengths"]) for data in lean.chains.values()) == -1


def test_the_command(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    store, out = tmp_path / "run.db", tmp_path / "run.html"
    power_sample(FakeLM(), "q", max_new_tokens=8, block_size=4, steps=4, chains=2, store=store)
    assert command(store, out=out, open_browser=True, quiet=False) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(
        rf"the report is in {out} \(\d\.\d MB\)\nno browser could be started; open the file by hand\n", printed.err
    )
    assert opened == [out.as_uri()]
    assert command(store, out=out, quiet=True) == 0
    assert capsys.readouterr() == ("", "")
    for bad, message in [
        ({"file": store, "out": store}, "is the store itself; name another file for the report"),
        ({"file": store, "out": tmp_path}, "it is a folder; name a file in it"),
        ({"file": out, "out": tmp_path / "b.html"}, "run.html"),
        ({"file": tmp_path / "none.db", "out": tmp_path / "b.html"}, "none.db"),
    ]:
        with pytest.raises(PowermcError, match=message):
            command(**bad, quiet=True)
    assert not (tmp_path / "b.html").exists()


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline"])
def test_without_the_packages(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=r"a report needs the package .*: pip install 'powermc\[report\]'"):
        page(made_up(steps=10))


def test_a_stored_run_tells_the_stages_apart_too():
    """A store rounds every number by itself: the difference of two is not what the third was rounded to."""
    run = made_up(chains=1, steps=100)
    (info,) = run.infos
    reached = np.isfinite(info["log_target"])
    nearer = reached & (info["log_ratio"] == info["log_target"] - info["log_surrogate"])
    target = info["log_target"] + np.random.default_rng(0).random(reached.shape)
    ratio = np.where(nearer, target - info["log_surrogate"], info["log_ratio"])
    exact = {**info, "log_target": target, "log_ratio": ratio}
    numbers = ("log_ratio", "log_stage1", "log_surrogate", "log_target")
    stored = {k: v.round(6) if k in numbers else v for k, v in exact.items()}
    for infos in (exact, stored):
        columns = report(replace(run, infos=(infos,))).chains[0, 0]["columns"]
        assert columns["on_record_2"] == nearer[0].tolist()
    assert 0 < nearer.sum() < reached.sum()
