"""The passes, one idea per file; installed as `tedfx.passes`. `tedfx.default_passes()` lists them in
order."""
