"""The backbone keeps its contract."""

from lens_example.backbone import Example

from lens_core.testing import check_backbone


def test_contract() -> None:
    config = Example.Config(channels=4, layers=2, text_width=8, width=16)
    check_backbone(Example(config), config, channels=4, layers=2, width=8)
