#!/usr/bin/env bash
# Runs one command on every host of a TPU VM pod slice, or of several slices.
#
#   launch/tpu_vm.sh --name TPU --zone ZONE [options] -- medglip train --config medglip_t --workdir gs://BUCKET/RUN ...
#
#   --name NAME        of the TPU VM; with --slices, of the queued resource
#   --zone ZONE        where it is
#   --project PROJECT  default: the one gcloud is set to
#   --slices N         slices of a queued resource (Multislice); default: a single TPU VM
#   --directory DIR    to run in, on the hosts; default: the home directory
#   --env NAME=VALUE   for the command; may be repeated
#   --hosts N          hosts of a slice, for --dry-run
#   --dry-run          print "NAME<tab>command" for each host instead; needs --hosts, and no gcloud
#
# medglip finds the other hosts by the metadata of the machine.
set -euo pipefail

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"; }
fail() { printf 'error: %s (--help lists the options)\n' "$1" >&2; exit 2; }
quote() { printf '%q ' "$@"; }  # for the shell of the hosts

name='' zone='' project='' slices='' directory='' hosts='' dry_run='' environment=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --help) usage; exit 0 ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --name | --zone | --project | --slices | --directory | --env | --hosts)
      [[ $# -gt 1 ]] || fail "$1 needs a value" ;;
    *) fail "unknown option $1" ;;
  esac
  case $1 in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --slices) slices=$2 ;;
    --directory) directory=$2 ;;
    --env) [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env $2: expected NAME=VALUE"; environment+=("$2") ;;
    --hosts) hosts=$2 ;;
  esac
  shift 2
done
[[ $# -gt 1 ]] || fail 'no command: write it after --'
shift
[[ -n $name && -n $zone ]] || fail '--name and --zone are needed'
[[ $slices =~ ^([1-9][0-9]*)?$ ]] || fail "--slices $slices: expected a number"

command="$(quote "$@")"
if [[ ${#environment[@]} -gt 0 ]]; then command="env $(quote "${environment[@]}")$command"; fi
if [[ -n $directory ]]; then command="cd $(quote "$directory")&& $command"; fi
command=${command% }

if [[ -n $dry_run ]]; then
  [[ $hosts =~ ^[1-9][0-9]*$ ]] || fail '--dry-run needs --hosts N, the hosts of a slice'
  for ((slice = 0; slice < ${slices:-1}; slice++)); do
    for ((host = 0; host < hosts; host++)); do
      printf '%s%s-w-%d\t%s\n' "$name" "${slices:+-$slice}" "$host" "$command"
    done
  done
  exit 0
fi

ssh=(gcloud compute tpus tpu-vm ssh "$name")
if [[ -n $slices ]]; then ssh=(gcloud compute tpus queued-resources ssh "$name" --node=all); fi
ssh+=("--zone=$zone" --worker=all)
if [[ -n $project ]]; then ssh+=("--project=$project"); fi
exec "${ssh[@]}" "--command=$command"
