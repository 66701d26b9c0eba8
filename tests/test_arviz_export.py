"""A run as a DataTree and as netCDF, and that ArviZ can work with both.

Runs under ArviZ 0.x (Python 3.11) and 1.x alike: what differs is in `of_arviz`.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import powermc
from powermc import ArgumentError, power_sample
from powermc.results import Run
from tests.fake_lm import FakeLM

xr = pytest.importorskip("xarray")
pytest.importorskip("h5netcdf")

SMALL = {"max_new_tokens": 12, "block_size": 4, "steps": 3, "draws": 24, "chains": 4, "alpha": 1.0}
GROUPS = {"posterior", "sample_stats", "sequences", "constant_data", "warmup_posterior", "warmup_sample_stats"}


@pytest.fixture(scope="module")
def run() -> Run:
    return power_sample(FakeLM(), ["first", "second\x00question"], **SMALL, exit=FakeLM())


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run.nc"
    run.to_netcdf(path, of_text={"sevens": lambda text: text.count("7")})
    return path


@pytest.fixture(scope="module")
def small() -> Run:
    """One prompt, one block, few variables: quick to write."""
    return power_sample(FakeLM(), "a", **{**SMALL, "block_size": 12, "draws": 4})


def one_failed() -> Run:
    with pytest.warns(RuntimeWarning):
        return power_sample(FakeLM(fail_at={220}), ["a", "b"], **SMALL)


def test_groups_dimensions_and_types(run):
    tree = run.to_datatree()
    assert set(tree.children) == GROUPS
    assert dict(tree["posterior"].sizes) == {"chain": 4, "draw": 24, "prompt": 2}
    assert dict(tree["warmup_posterior"].sizes) == {"chain": 4, "draw": 6, "prompt": 2}
    assert tree["sequences"]["tokens"].dims == ("chain", "draw", "prompt", "token")
    assert tree["sequences"]["tokens"].dtype == np.int32
    assert {v.dtype for v in tree["posterior"].data_vars.values()} == {np.dtype("float64")}
    stats = tree["sample_stats"]
    for name, values in run.infos[0].items():
        if name not in ("log_p", "length", "log_density"):
            assert stats[name].dtype == values.dtype
    assert set(stats.data_vars) == set(run.infos[0]) - {"log_p", "length", "log_density"} | {
        "lp", "acceptance_rate", "taken",
    }  # fmt: skip
    assert stats["log_ratio"].attrs["units"] == "nats"


def test_every_value_is_where_it_belongs(run):
    tree = run.to_datatree(of_path={"first": lambda path: path.tokens[0]})
    for p in range(2):
        alone = run.to_datatree(p)
        assert "prompt" not in alone["posterior"].dims
        for c, chain in enumerate(run.chains[p]):
            info = {name: values[c] for name, values in run.infos[p].items()}
            for i, path in enumerate(chain.draws):
                at = {"prompt": p, "chain": c, "draw": i}
                posterior = tree["posterior"].to_dataset().sel(at)
                assert posterior["log_p"] == path.log_prob == info["log_p"][6 + i]
                assert (posterior["length"], posterior["finished"]) == (len(path), path.finished)
                assert posterior["first"] == path.tokens[0]
                tokens = tree["sequences"]["tokens"].sel(at).values
                assert tuple(tokens[: len(path)]) == path.tokens
                assert (tokens[len(path) :] == -1).all()
                assert posterior["step"] == 6 + i
            stats = tree["sample_stats"].to_dataset().sel(prompt=p, chain=c)
            np.testing.assert_array_equal(stats["lp"], info["log_density"][6:])
            np.testing.assert_array_equal(stats["acceptance_rate"], info["accepted"][6:])
            for name in ("accepted", "changed", "cut", "proposal_length", "stage1_accepted", "gated", "log_surrogate"):
                np.testing.assert_array_equal(stats[name], info[name][6:])
                np.testing.assert_array_equal(alone["sample_stats"][name][c], info[name][6:])
            warm = tree["warmup_sample_stats"].to_dataset().sel(prompt=p, chain=c)
            np.testing.assert_array_equal(warm["cut"], info["cut"][:6])
            np.testing.assert_array_equal(tree["warmup_posterior"]["log_p"].sel(prompt=p, chain=c), info["log_p"][:6])
        prompt = alone["constant_data"]
        assert tuple(prompt["prompt_tokens"].values) == run.prompts[p].ids
        assert prompt["prompt_text"].item() == run.prompts[p].text.replace("\x00", r"\x00")


def test_only_what_the_kernel_declares(small):
    plain = small.to_datatree()
    assert not {"stage1_accepted", "gated", "log_surrogate"} & set(plain["sample_stats"].data_vars)
    assert {"accepted", "abandoned", "cut", "lp"} <= set(plain["sample_stats"].data_vars)
    assert set(plain.children) == {"posterior", "sample_stats", "sequences", "constant_data"}  # one block, no warm-up
    assert set(plain["posterior"].dims) == {"chain", "draw"}


def test_attributes_of_the_schema(run):
    tree = run.to_datatree()
    for node in (tree, tree["posterior"], tree["sample_stats"]):
        attrs = node.attrs
        assert attrs["inference_library"] == attrs["creation_library"] == "powermc"
        assert attrs["sampling_time"] == run.seconds
        assert attrs["tuning_steps"] == 6
        assert attrs["created_at"].endswith("+00:00")
    assert json.loads(tree.attrs["settings"])["alpha"] == 1.0
    assert (tree.attrs["kernel"], tree.attrs["model"], tree.attrs["failed_chains"]) == ("early-exit", "fake", 0)


def test_a_failed_chain_is_nan_and_padding():
    run = one_failed()
    ((p, c), error) = next(iter(run.errors.items()))
    tree, done = run.to_datatree(p), len(run.chains[p][c].draws)
    assert 0 < done < 24
    assert np.isfinite(tree["posterior"]["log_p"][c, :done]).all()
    for name in ("log_p", "length", "finished"):
        assert np.isnan(tree["posterior"][name][c, done:]).all()
    assert (tree["sequences"]["tokens"][c, done:] == -1).all()
    assert tree["sample_stats"]["taken"][c].sum() == done
    assert np.isnan(tree["sample_stats"]["acceptance_rate"][c, done:]).all()
    assert str(error) in tree.attrs["errors"]


def test_netcdf_reads_back_the_same_with_plain_xarray(run, file):
    with xr.open_datatree(file, engine="h5netcdf") as back:
        tree = run.to_datatree(of_text={"sevens": lambda text: text.count("7")})
        assert set(back.children) == GROUPS
        for name in GROUPS:
            xr.testing.assert_equal(back[name].to_dataset().load(), tree[name].to_dataset())
            for variable in tree[name].data_vars:
                if variable != "prompt_text":
                    assert back[name][variable].dtype == tree[name][variable].dtype
        assert {**back.attrs, "created_at": ""} == {**tree.attrs, "created_at": ""}


# ArviZ's own plots and unknown groups warn; that it imports slowly is why it is imported here.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_arviz_reads_it_and_works_on_it(file):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    az = pytest.importorskip("arviz")
    data = az.from_netcdf(file)
    summary = az.summary(data, var_names=["log_p", "sevens"])
    assert list(summary.index) == ["log_p[0]", "log_p[1]", "sevens[0]", "sevens[1]"]
    ess = of_arviz(az.ess(data))
    with xr.open_datatree(file, engine="h5netcdf") as plain:
        for p in range(2):
            values = plain["posterior"]["log_p"].sel(prompt=p).values
            assert float(ess["log_p"].sel(prompt=p)) == pytest.approx(float(az.ess(values)))
    assert of_arviz(az.rhat(data))["log_p"].sizes == {"prompt": 2}
    az.plot_trace(data, var_names=["log_p"])
    matplotlib.pyplot.close("all")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_arviz_takes_the_tree_itself(run):
    az = pytest.importorskip("arviz")
    tree = run.to_datatree(0)
    data = az.from_datatree(tree) if hasattr(az, "from_datatree") else tree  # ArviZ 0.x has a class of its own
    assert list(az.summary(data).index) == ["log_p", "length", "finished"]


def of_arviz(found):
    """ArviZ 0.x answers with a Dataset, 1.x with a DataTree."""
    return found.to_dataset() if isinstance(found, xr.DataTree) else found


def test_no_draws_is_a_tree_too(tmp_path):
    run = power_sample(FakeLM(), "a", **{**SMALL, "block_size": 12, "draws": 0})
    assert run.to_datatree()["posterior"].sizes["draw"] == 0
    run.to_netcdf(tmp_path / "run.nc")


def test_bad_requests(run, small, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="there is no prompt 2; the run has prompts 0 to 1"):
        run.to_datatree(2)
    with pytest.raises(ArgumentError, match="a functional 'log_p' already; choose another name"):
        run.to_datatree(of_path={"log_p": len})
    with pytest.raises(ArgumentError, match="f must give a number of every draw, got 'one"):
        run.to_datatree(of_text={"f": lambda text: "one" + text})
    with pytest.raises(FileNotFoundError):
        small.to_netcdf(tmp_path / "none" / "run.nc")
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(ArgumentError, match=r"this needs h5netcdf; install it with: pip install 'powermc\[netcdf\]'"):
        run.to_netcdf(tmp_path / "run.nc")
    assert not (tmp_path / "run.nc").exists()


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "run.nc"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        small.to_netcdf(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["run.nc"]


def test_arviz_is_never_imported():
    """It takes seconds: R-hat, summaries and files must not wait for it. Function-level imports count too."""
    package = Path(powermc.__file__).parent
    for source in [package / "summary.py", package / "arviz_export.py", *(package / "diagnostics").glob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("arviz", "matplotlib", "torch")) for name in names), source.name
