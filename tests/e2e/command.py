"""Run ``megatron-eagle`` as a script, for launchers that want a file."""

from megatron_eagle.cli.main import main

raise SystemExit(main())
