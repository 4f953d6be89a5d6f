"""One thread an operation: the tests run in as many processes as there are cores. And nothing is timed."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("cdclean", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cdclean")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network for three classes, which timm knows by the file's name."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "test_resnet.pt"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server on this machine, which this process and its children talk to."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The URL of a new bucket."""
    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"
