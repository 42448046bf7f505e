"""A KV connector for vLLM: lets one server fetch from another the KV of tokens that it would have to compute.

Runs inside vLLM's processes and imports nothing of Mell: torch, numpy and pyzmq come with vLLM.
"""
