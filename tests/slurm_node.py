"""A Slurm of one node for the tests, with two GPUs that are none, and no rights or services beyond those of root."""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
_PR_SET_PDEATHSIG = 1

_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=30
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 Gres=gpu:fake:2 State=UNKNOWN
PartitionName=gpu Nodes={host} MaxTime=01:00:00 State=UP Default=YES
PartitionName=cpu Nodes={host} MaxTime=02:00:00 State=UP
"""


SETTINGS = """
gpu: {partition: gpu, gres: "gpu:1", cpus-per-task: 1, mem: 1G}
cpu: {partition: cpu, cpus-per-task: 1, mem: 1G}
time: {sample: "00:30:00", evaluate: "00:30:00", table: "00:30:00"}
images_per_task: 4
"""


def why_not() -> str | None:
    """Why it cannot start here; None where it can."""
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    if lacking:
        return f"no {', '.join(lacking)} (on Debian: apt-get install slurm-wlm munge)"
    if os.getuid() != 0:
        return "the daemons of Slurm are started as root only"
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mknod", f"{folder}/null", "c", "1", "3"], capture_output=True)
    return "no device nodes can be made here (mknod)" if made.returncode else None


def until(done: Callable[[], object], what: str, seconds: float = 900, pause: float = 0.1) -> None:
    """Wait. The patience is for machines that are busy with other things."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited too long for: {what}"
        time.sleep(pause)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class SlurmNode:
    """A context in which Slurm runs and the environment says where. Its daemons end with it, and with this process."""

    def __enter__(self) -> "SlurmNode":
        self.root = Path(tempfile.mkdtemp(prefix="slurm"))      # a short path, for the socket
        self.root.chmod(0o755)
        self._daemons: list[subprocess.Popen] = []
        self._before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SQUEUE", "SINFO"))]:
            del os.environ[name]
        os.environ.update(SLURM_CONF=str(self.root / "slurm.conf"), PATH=_PATH)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        (root / "munge.key").write_bytes(secrets.token_bytes(128))
        (root / "munge.key").chmod(0o400)
        for name in ("state", "spool"):
            (root / name).mkdir()
        for i in range(2):
            subprocess.run(["mknod", str(root / f"nvidia{i}"), "c", "1", "3"], check=True)
        (root / "slurm.conf").write_text(_CONF.format(root=root, host=host, ports=_free_ports(2)))
        (root / "gres.conf").write_text(f"Name=gpu Type=fake File={root}/nvidia[0-1]\n")
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={root}/munge{end}" for name, end in (
            ("key-file", ".key"), ("socket", ".socket"), ("pid-file", ".pid"), ("log-file", ".log"),
            ("seed-file", ".seed"))))
        until((root / "munge.socket").exists, "munged", 60)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D", "-c")
        until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%t", may_fail=True), "an idle node", 120)

    def _daemon(self, *words: str) -> None:
        with open(self.root / f"{words[0]}.out", "w") as log:
            self._daemons.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                                  preexec_fn=_die_with_parent, start_new_session=True))

    def __exit__(self, *_) -> None:
        try:
            if len(self._daemons) == 3:
                self.ask("scancel", "-u", "root", may_fail=True)
                with contextlib.suppress(AssertionError):
                    until(lambda: not self.ask("squeue", "-h", may_fail=True), "the jobs to end", 60)
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self._kill_what_is_left()
            os.environ.clear()
            os.environ.update(self._before)
            shutil.rmtree(self.root, ignore_errors=True)

    def _kill_what_is_left(self) -> None:
        """Processes of jobs that would not end: those that were started with this node's configuration."""
        ours = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(path.name) != os.getpid() and ours in (path / "environ").read_bytes().split(b"\0"):
                    os.kill(int(path.name), signal.SIGKILL)

    def ask(self, *words: str, may_fail: bool = False) -> str:
        """What a client prints; it never waits for ever."""
        done = subprocess.run(["timeout", "60", *words], capture_output=True, text=True)
        assert may_fail or done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def queue(self) -> dict[str, str]:
        """'12_3' or '14' -> 'RUNNING', of all jobs that are not over."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def start_now(self, job: str) -> None:
        """A requeued job, which would wait two minutes. Within the second of its end, Slurm would refuse it: its
        credential has just been revoked.
        """
        self.ask("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def wait(self) -> None:
        """Until no job is left."""
        until(lambda: not self.queue(), "the queue to be empty")
