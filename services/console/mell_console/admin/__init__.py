"""Commands for operators: each asks a frontend's `/admin` API and shows the answer."""
