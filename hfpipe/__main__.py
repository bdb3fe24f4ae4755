from hfpipe.cli import main

raise SystemExit(main())
