"""`python -m ddpo_trl.cli`: what `accelerate launch` starts."""

from ddpo_trl.cli import main


raise SystemExit(main())
