"""What nbval does not compare: pictures (their data is tested in tests/) and the progress bars on stderr."""

from nbval.plugin import IPyNbFile


def pytest_collectstart(collector):
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("image/svg+xml", "stderr")
