"""Cluster files and the executor made of them: mistakes are refused before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.cluster import ClusterConfig, SSHConfig, read_cluster, slurm_executor

EXAMPLES = sorted(Path("slurm/clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted(path: Path) -> None:
    cluster = read_cluster(path)
    slurm_executor(cluster, nodes=2, ranks_per_node=cluster.ranks_per_node, stage_dir=Path("runs/sft"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{account: a, partition: b, environment: {HF_TOKEN: x}}", "would write HF_TOKEN into a script"),
        ("{account: a, partition: b, setup: ['export WANDB_API_KEY=x']}", "would write WANDB_API_KEY into a script"),
        ("{account: a, partition: b, mem: [1, 2]}", "mem"),
        ("{account: a, partition: b, nodes: two}", "Value 'two' .* could not be converted to Integer"),
        ("{account: a", "expected ',' or '}'"),
        ("[account, partition]", "cluster.yaml: "),
        ("", "account"),
        ("{account: a, partition: b, pass_environment: [PRISM_NOT_SET]}", "PRISM_NOT_SET, which is not set here"),
        ("{account: a, partition: b, gpu_per_node: 8}", "gpu_per_node"),
        ("{account: a}", "partition"),
    ],
)
def test_mistakes_are_named(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_cluster(tmp_path / "cluster.yaml")


def test_a_folder_that_nemo_run_would_rename_is_refused() -> None:
    ssh = SSHConfig(host="login", user="me", job_dir="/shared/nemo_run")
    with pytest.raises(ValueError, match="/shared/nemo_run"):
        slurm_executor(ClusterConfig("a", "b", ssh=ssh), nodes=1, ranks_per_node=8, stage_dir=Path("runs/sft"))
