# The NixOS configuration of this agent's container. Changes go through the operator:
# edit a checkout, commit, and ask with request_apply_commit.
{ pkgs, ... }:
{
  # Programs that Claude's shell finds on its PATH.
  environment.systemPackages = with pkgs; [
    git
    ripgrep
  ];
}
