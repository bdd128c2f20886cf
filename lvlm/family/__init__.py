"""Families of models: specs of their parts, the registry of specs, and detection of parts in a model.

Modules, in the order in which a model passes them at load: `registry` (specs by model type), `specification` (a spec, and
modules by path), `module_detection` (fields that a spec leaves open). `lvlm.identity_checks` then checks the result.
"""
