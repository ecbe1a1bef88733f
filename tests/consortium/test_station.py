from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.consortium.conftest import site_kit

from fedcast.consortium.provision import Consortium
from fedcast.consortium.station import serve
from fedcast.errors import SourceError


def test_when_a_site_s_folder_holds_no_data_then_that_is_said_before_it_joins(
    consortium: Callable[..., Consortium], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(SourceError, match="holds no CSV"):
        serve(site_kit(consortium()), tmp_path / "data", tmp_path / "state", print)
    assert not (tmp_path / "state").exists()
