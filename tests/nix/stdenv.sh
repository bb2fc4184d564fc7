# Of nixpkgs' stdenv what the package of hyperhive needs, to be sourced by a POSIX shell.

runHook() { :; }

# makeWrapper PROGRAM WRAPPER [--set NAME VALUE] [--add-flags FLAGS] …
makeWrapper() {
  program=$1 wrapper=$2 set= flags=
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --set) set="$set $2=$3"; shift 3 ;;
      --add-flags) flags="$flags $2"; shift 2 ;;
      *) echo "makeWrapper $1?" >&2; exit 1 ;;
    esac
  done
  mkdir -p "${wrapper%/*}"
  printf '#!/bin/sh\nexec env%s %s%s "$@"\n' "$set" "$program" "$flags" >"$wrapper"
  chmod +x "$wrapper"
}
