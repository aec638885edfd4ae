"""The verbs: each a config in, a result out. The command line is a skin over this table."""

from mistudio.studio.verb import VERBS, Verb, load_verb

__all__ = ["VERBS", "Verb", "load_verb"]
