"""What every part of nearshard shares: a pure core, and under it a small runtime.

The pure modules do no I/O and import no asyncio and no aiohttp; ``tests/unit/test_layering.py`` holds that.
"""
