import pytest
from digits import write_digits


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """Synthetic digits in place of MNIST: see write_digits."""
    return write_digits(tmp_path_factory.mktemp("data"))
