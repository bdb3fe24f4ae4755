"""A Hub of the tests' own: the unmodified `huggingface_hub` client pushes to it and pulls from it over loopback.

    with LocalHub(folder, xet=True) as hub:
        subprocess.run(command, env=os.environ | hub.env())

It holds models and datasets, public and private, with branches, tags, and commits of one transaction, and keeps large
files as the real service does: on another origin, which the user's token must not reach, by LFS (whole and in parts)
or by Xet. It answers with the status codes of huggingface.co, as far as these could be read from the client
and its tests. `python -m tests.localhub --root FOLDER` serves one by itself.

Left out: Spaces, gated repos, pull requests, squashing, listing and searching repos, pages of answers, `git clone`.
`.gitattributes` is written with a repo's first commit and not kept up to date; which files are large is decided by
their names' endings, by size, and by a zero byte near the start. Each start begins empty.
"""

from .server import LocalHub

__all__ = ["LocalHub"]
