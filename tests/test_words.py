"""Words of pools, hostfiles and stores: a name is a host, keys are never shown, stores say rows and models."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import swarmkit as sk

GENES = pd.DataFrame({"gene": ["lacZ", "recA", "BAD"]})
ASK = "What does {gene} do?"


def test_a_name_is_a_host(echo: sk.LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        sk.NoEndpointsError, match=r"(?s)no endpoint can be used.*node001.invalid:8000.*no file of that"
    ):
        sk.connect("node001.invalid", probe_timeout=1)
    monkeypatch.chdir(tmp_path)
    sk.connect(echo)
    (tmp_path / "agents").write_text(f"{echo.endpoints[0].name} key_env=SWARMKIT_ECHO\n")
    monkeypatch.setenv("SWARMKIT_ECHO", echo.endpoints[0].key() or "")
    assert sk.connect("agents").endpoints[0].name == echo.endpoints[0].name, "a file of that name comes first"
    for name in ("agnets.hostfile", "hostfile", "here/agents"):
        with pytest.raises(sk.HostfileError, match="there is no hostfile"):
            sk.connect(name)


def test_only_what_may_be_a_missing_file_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("agents.hostfile").write_text("127.0.0.1:1\n127.0.0.1:2\n")
    for target in ("agents.hostfile", "127.0.0.1", "127.0.0.[1-2]", "localhost"):
        with pytest.raises(sk.NoEndpointsError) as caught:
            sk.connect(target, probe_timeout=1)
        assert "no file of that name" not in str(caught.value)


def test_a_key_in_a_hostfile_is_never_shown(tmp_path: Path) -> None:
    key = "0123456789abcdef0123456789abcdef"
    path = tmp_path / "agents.hostfile"
    for line in (key, f"node1 {key}", f"node1 8000 {key}", f"node1 key_cmd={key}", f"node1 8000 x: {key}"):
        path.write_text(line + "\n")
        with pytest.raises(sk.HostfileError) as caught:
            sk.parse_hostfile(path)
        assert key not in str(caught.value)


@pytest.mark.parametrize("container", ["myproject_vllm_worker_llama3_8b_instruct_1", "0123456789abcdef" * 4])
def test_a_long_name_of_a_container_is_a_host(container: str, tmp_path: Path) -> None:
    path = tmp_path / "agents.hostfile"
    for line in (f"http://{container}:8000", f"{container}:8000", f"{container} 8000"):
        path.write_text(line + "\n")
        assert [e.name for e in sk.parse_hostfile(path)] == [f"{container}:8000"]
    assert sk.VLLMPool([f"http://{container}"]).endpoints[0].port == 80


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARMKIT_NOPE", raising=False)
    endpoint = sk.AgentEndpoint("node1", key_env="SWARMKIT_NOPE")
    assert "$SWARMKIT_NOPE, which is not set" in endpoint._repr_html_()


def test_a_store_says_rows_and_models(pool: sk.VLLMPool, tmp_path: Path) -> None:
    GENES.swarm.scatter(ASK, store=tmp_path / "s")
    store = sk.open_store(tmp_path / "s")
    assert repr(store).endswith("3 rows of echo>")
    assert "1 file, " in store._repr_html_()
    assert "0.0" not in store._repr_html_()
    assert "0 rows" in repr(sk.open_store(tmp_path / "none"))


def test_verbs_and_plots_are_listed_without_anything_else() -> None:
    _, _, *verbs = repr(GENES.swarm).removesuffix(">").splitlines()
    assert len({len(line) - len(line.split(None, 1)[1]) for line in verbs}) == 1, "their summaries are aligned"
    assert dir(sk.plots) == sorted(sk.plots.__all__)
