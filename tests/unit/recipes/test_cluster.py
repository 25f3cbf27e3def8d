"""Cluster files and the executor made of them: mistakes are refused before anything is submitted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recipes.cluster import GRACE_SECONDS, ClusterConfig, SSHConfig, read_cluster, setup_lines, slurm_executor
from recipes.secrets import assigned_secrets, is_secret_name, line_of_secret_value

EXAMPLES = sorted(Path("slurm/clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_accepted(path: Path) -> None:
    cluster = read_cluster(path)
    slurm_executor(cluster, nodes=2, ranks_per_node=cluster.ranks_per_node, stage_dir=Path("runs/sft"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("mem: [1, 2]", "mem"),
        ("nodes: two", "Value 'two' .* could not be converted to Integer"),
        ("pass_environment: [PRISM_NOT_SET]", "PRISM_NOT_SET, which is not set here"),
        ("gpu_per_node: 8", "gpu_per_node"),
        ("nodes: -1", "nodes must be at least 1, got -1"),
        ("ranks_per_node: 0", "ranks_per_node must be at least 1, got 0"),
        ("gpus_per_node: -8", "gpus_per_node must be at least 0, got -8"),
        ("max_crashes: -1", "max_crashes must be at least 0, got -1"),
        ("time: abc", "time must be minutes, hours:minutes:seconds or days-hours, got 'abc'"),
        ("time: ''", "time must be minutes"),
        ("grace_seconds: -5", r"grace_seconds must be from 1 to 65535, or 0 \(by the stage\), got -5"),
        ("grace_seconds: 3600\ntime: 1:00:00", r"grace_seconds \(3600\) must be less than the time, 1:00:00"),
        ("environment: {'X;rm -rf /': v}", "environment has 'X;rm -rf /', which is no name of a variable"),
        ("environment: {'A B': v}", "environment has 'A B'"),
        ("pass_environment: ['$(id)']", r"pass_environment has '\$\(id\)', which is no name"),
        ("account: my account", "account must be one word for an #SBATCH line, got 'my account'"),
        ("sbatch: {comment: 'my run'}", "comment must be one word"),
        ("sbatch: {qos: ''}", "qos must be one word"),
        ("sbatch: {'qos;rm -rf': x}", "sbatch has 'qos;rm -rf', which is no name of an option"),
        ('srun: ["--mpi=none\\nrm"]', "an item of srun or container_mounts must be one line"),
    ],
)
def test_values_that_slurm_or_the_shell_would_misread(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_cluster(cluster_file(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{account: a", "expected ',' or '}'"),
        (b"[account, partition]", "cluster.yaml: "),
        (b"", "account"),
        (b"{account: a}", "partition"),
        ("account: zürich".encode("latin-1"), r"cluster.yaml is not UTF-8 \(byte 10\); write it again as UTF-8"),
    ],
)
def test_files_that_are_no_cluster_file(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_cluster(tmp_path / "cluster.yaml")


NAMES = "HF_TOKEN WANDB_API_KEY WANDB_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN PASSWD PGPASS"
NAMES += " PGPASSWORD AUTH GIT_AUTH hf_token GITHUBTOKEN MYSQL_PWD SSH_PASSPHRASE CLIENT_SECRET OPENAI_APIKEY"
PUBLIC = "TOKENIZERS_PARALLELISM MAX_TOKENS PWD AWS_REGION AWS_DEFAULT_REGION HF_TOKEN_PATH GIT_AUTHOR_NAME XAUTHORITY"
PUBLIC += " NCCL_IB_HCA MONKEY PYTHONPATH SSH_AUTH_SOCK COMPASS"


@pytest.mark.parametrize("name", NAMES.split())
def test_a_secret_by_its_name_is_refused_wherever_it_is_given_a_value(name: str, tmp_path: Path) -> None:
    assert is_secret_name(name)
    option = name.lower().replace("_", "-")
    for text in (
        f"environment: {{{name}: x}}",
        f"setup: ['export {name}=x']",
        f"setup: ['{name}=\"x\" python login.py']",
        f"setup: ['login --{option} x']",
        f"setup: ['login --{option}=x']",
        f"srun: ['--export=ALL,{name}=x']",
        f"srun: ['--export', 'A=1,{name}=x']",
        f"srun: ['--{option}', 'x']",
        f"sbatch: {{export: 'NONE,{name}=x'}}",
    ):
        with pytest.raises(ValueError, match=r"would write .* into a script; name it in pass_environment instead"):
            read_cluster(cluster_file(tmp_path, text))
    for text in (
        f"setup: ['export {name}=$OTHER']",
        f"setup: ['export {name}=\"$(cat file)\"']",
        f"setup: ['login --{option} $OTHER']",
        f"setup: ['unset {name}; test -z \"${name}\"']",
        f"srun: ['--export=ALL,{name}']",
    ):
        read_cluster(cluster_file(tmp_path, text))


@pytest.mark.parametrize("name", PUBLIC.split())
def test_ordinary_names_may_be_written(name: str, tmp_path: Path) -> None:
    assert not is_secret_name(name)
    read_cluster(cluster_file(tmp_path, f"environment: {{{name}: x}}", f"setup: ['export {name}=x']"))


VALUES = ["hf_" + "aB3" * 6, "sk-" + "a1" * 12, "sk-proj-" + "a1" * 12, "ghp_" + "aB3" * 12, "github_pat_" + "a1" * 20]
VALUES += ["AKIA" + "A1B2" * 4, "glpat-" + "a1" * 10, "xoxb-" + "1" * 12, "nvapi-" + "a1" * 10]
VALUES += ["https://me:word@proxy:80", "-----BEGIN RSA PRIVATE KEY-----"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:6])
def test_a_secret_by_its_value_is_refused_by_its_line_and_not_repeated(value: str, tmp_path: Path) -> None:
    for text in (f"setup: ['login {value}']", f"environment: {{X: '{value}'}}", f"mem: 1G # {value}"):
        with pytest.raises(
            ValueError, match=r"cluster.yaml, line 3: a value that looks like a token or a key"
        ) as error:
            read_cluster(cluster_file(tmp_path, text))
        assert value not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "pip install hf_transfer sk-learn",
        "python -m tools.convert --hf hf_checkpoint",
        "export URL=http://proxy:3128",
        "git clone git@github.com:me/prism.git && git checkout 300132b0aa83c4ac0c46f4dd2bbc4bd1c0d2eb3e",
        "source ~/.secrets/env.sh",
    ],
)
def test_ordinary_lines_may_be_written(line: str) -> None:
    assert not list(assigned_secrets(line))
    assert line_of_secret_value(line) is None


def test_a_login_with_a_key_is_refused() -> None:
    for line in ("wandb login abc123", 'curl -H "Authorization: Bearer abc"', "machine x login me password abc"):
        assert list(assigned_secrets(line)), line
    assert not list(assigned_secrets("wandb login $WANDB_KEY"))


def test_the_script_repeats_no_value_in_its_log_and_quotes_its_paths(tmp_path: Path) -> None:
    """The lines run as NeMo-Run's script has them, after set -evx and set +e."""
    cluster = ClusterConfig("a", "b", workdir="/my work", environment={"GREETING": "a b'c"}, setup=["X=not-to-be-seen"])
    lines = setup_lines(cluster, Path("runs/my run")).splitlines()
    exported = [line for line in lines if not line.startswith(("until", "job_dir", "source"))]
    script = "\n".join(
        ["set -evx", "set +e", *exported, 'printf "%s|" "$GREETING" "$PRISM_WORKDIR" "$PRISM_STAGE_DIR"']
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "a b'c|/my work|runs/my run|"
    (tmp_path / "script.sh").write_text(script)
    done = subprocess.run(["bash", tmp_path / "script.sh"], capture_output=True, text=True, check=True)
    assert "not-to-be-seen" not in done.stderr
    assert "GREETING" not in done.stderr
    assert lines[-3:] == [
        'job_dir=$(dirname "$output")',
        'export PRISM_CONSOLE="$job_dir/log-*_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}.out"',
        'source "$job_dir/code/slurm/job.sh" || exit 1',
    ]


@pytest.mark.parametrize("folder", ["/shared/nemo_run", "/shared/my runs"])
def test_a_folder_that_nemo_run_would_garble_is_refused(folder: str) -> None:
    ssh = SSHConfig(host="login", user="me", job_dir=folder)
    with pytest.raises(ValueError, match=folder):
        slurm_executor(ClusterConfig("a", "b", ssh=ssh), nodes=1, ranks_per_node=8, stage_dir=Path("runs/sft"))


@pytest.mark.parametrize(
    ("text", "stage", "signal"),
    [
        ("time: 04:00:00", "sft", "TERM@300"),
        ("time: 04:00:00", "align", "TERM@900"),
        ("time: 12:00:00", "rlvr", "TERM@1800"),  # not 43200, which it is in base 60
        ("time: 1-00:00:00", "rlvr", "TERM@1800"),
        ("time: UNLIMITED", "rlvr", "TERM@1800"),
        ("time: 60", "rlvr", "TERM@900"),  # a quarter of the time limit
        ("time: 4:00", "sft", "TERM@60"),
        ("time: 60\ngrace_seconds: 1200", "rlvr", "TERM@1200"),
    ],
)
def test_the_stage_gets_its_signal_early_enough(text: str, stage: str, signal: str, tmp_path: Path) -> None:
    assert set(GRACE_SECONDS) == {"sft", "collect", "warmup", "align", "rlvr"}
    executor = slurm_executor(read_cluster(cluster_file(tmp_path, text)), 1, 8, Path("runs/x"), stage)
    assert executor.signal == signal


def test_a_batch_script_without_its_arguments_says_how_to_call_it() -> None:
    for arguments in ([], ["runs/x"], ["runs/x", "lr=1"], ["lr=1", "tiny_sft"]):
        done = subprocess.run(["bash", "slurm/train.sbatch", *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "sbatch --nodes=N slurm/train.sbatch STAGE_DIR RECIPE" in done.stderr


@pytest.mark.parametrize(("process", "healthy"), [("", True), ("nvidia-cuda-mps-server", True), ("python", False)])
def test_a_server_of_mps_is_no_process_of_another_job(process: str, healthy: bool, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    answers = f"*compute-apps*) echo {process} | grep . ;; *ecc*) echo 0 ;; *remapped*) echo No ;; -L) echo GPU ;;"
    program.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PRISM_LOGS": str(tmp_path), "SLURMD_NODENAME": "n1"}
    done = subprocess.run(["bash", "slurm/check_node.sh"], env=environment, capture_output=True, text=True, check=False)
    assert ("still hold a GPU" not in done.stderr) == healthy, done.stderr


def cluster_file(folder: Path, *lines: str) -> Path:
    """A file with a partition, an account unless ``lines`` have one, and ``lines``."""
    account = [] if lines[0].startswith("account") else ["account: a"]
    path = folder / "cluster.yaml"
    path.write_text("\n".join(["partition: b", *account, *lines]))
    return path
