import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "port"), [("PORT", 16379), ("DASHBOARD_PORT", 10001), ("PORT", 19999)])
def test_a_head_at_a_port_of_rays_own_is_refused(name, port):
    script = ROOT / "cluster" / "start-head.sh"
    done = subprocess.run(
        ["bash", script], env={name: str(port), "PATH": "/bin:/usr/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"error: {name}={port} lies in 10001..19999" in done.stderr
