#!/usr/bin/env bash
# Puts libllama (llama.cpp v0.5.0, built for any x86-64 Linux) into a folder, from npm's package; tests/test_gguf_export.py
# finds it in ~/.cache/libllama or where $LIBLLAMA says. Without npm or the network nothing is there, and those tests skip.
set -euo pipefail
target=${1:-${LIBLLAMA:-$HOME/.cache/libllama}}
compgen -G "$target/libllama.*so" >/dev/null && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @node-llama-cpp/linux-x64@3.22.1 >/dev/null
tar xzf ./*.tgz
mkdir -p "$target"
cp package/bins/linux-x64/lib*.so package/LICENSE "$target"
