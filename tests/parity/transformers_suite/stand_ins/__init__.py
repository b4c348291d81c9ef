"""Our stand-ins for the few files that Transformers' test mixins import and its source distribution lacks."""
