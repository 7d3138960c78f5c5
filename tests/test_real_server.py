"""A real TensorFlow Serving, where the environment names one; see docs/serving.md."""

import os
import socket
import subprocess

import numpy as np
import pytest
from conftest import NOISY_SCHEDULE
from serving_fixtures import SHAPE, TABLE, TRANSPORTS, share_within_one

from ddsm_tf.export.serving_files import server_flags
from ddsm_tf.models import DiffusionModel
from ddsm_tf.serving import ServingClient

SEED = 2**40 + 3


@pytest.fixture
def real_server(served_folder, tmp_path):
    """{transport: target} of a server named by the environment; see docs/serving.md."""
    if target := os.environ.get("DDSM_SERVING_TARGET"):
        yield {"grpc": target}
        return
    binary = os.environ.get("TENSORFLOW_MODEL_SERVER")
    if not binary:
        pytest.skip("set TENSORFLOW_MODEL_SERVER to a binary or DDSM_SERVING_TARGET to HOST:PORT")
    ports = {}
    for transport in TRANSPORTS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[transport] = free.getsockname()[1]
    where = [f"--port={ports['grpc']}", f"--rest_api_port={ports['rest']}"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [binary, *where, *server_flags(str(served_folder))], stdout=log, stderr=log
        )
    try:
        targets = {transport: f"127.0.0.1:{port}" for transport, port in ports.items()}
        ServingClient(targets["grpc"], timeout=240, retries=1000).status()
        yield targets
    finally:
        process.terminate()
        process.wait(30)
        print((tmp_path / "log").read_text()[-4000:])


@pytest.mark.timeout(600)
def test_a_real_server(real_server, tiny_unet):
    expected = DiffusionModel(tiny_unet, TABLE).sample(NOISY_SCHEDULE, 7, seed=SEED)
    for transport, target in real_server.items():
        client = ServingClient(target, transport=transport, timeout=240)
        assert "AVAILABLE" in [status.state for status in client.status()]
        wanted = {"sample", "sample_images", "sample_noise", "sample_schedule", "serving_default"}
        assert wanted <= set(client.signatures())
        images = client.sample(7, SEED, batch_size=3)
        assert share_within_one(client.sample(2, SEED), images[:2]) >= 0.999
        if "rest" in real_server:
            assert share_within_one(images, expected) >= 0.999
            assert client.denoise(np.ones((2, *SHAPE), np.float32), 5, 0.5).std() > 0
            assert len(client.sample_schedule(NOISY_SCHEDULE, 2, SEED)) == 2
