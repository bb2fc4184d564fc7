# A stand-in for nixpkgs: the packages and builders that module.nix and flake.nix name. Most tests only evaluate it;
# what is built has the machine's own programs in it, and `claude` is the rehearsal. A package that is unfree is
# refused unless the predicate allows it, as in nixpkgs.
{
  system ? "x86_64-linux",
  config ? { },
  overlays ? [ ],
  lib ? import ./lib.nix,
}:
let
  # A file in the store keeps its text in sight, so that a test can read it without building it.
  package =
    {
      pname,
      version ? "1",
      unfree ? false,
      meta ? { mainProgram = pname; },
      script ? "mkdir $out; ln -s /usr/bin /usr/sbin $out",
      ...
    }@attrs:
    let
      it =
        derivation {
          name = attrs.name or "${pname}-${version}";
          builder = "/bin/sh";
          args = [ "-euc" script ];
          PATH = "/usr/bin:/bin";
          inherit system;
          text = attrs.text or "";
        }
        // { inherit version; }
        // removeAttrs attrs [ "unfree" "script" ]
        // { inherit meta; };
    in
    if unfree && !(config.allowUnfreePredicate or (_: false)) it then
      throw "Package ‘${it.name}’ has an unfree license, refusing to evaluate."
    else
      it;

  named = pname: package { inherit pname; };

  writeText = name: text: package {
    pname = name;
    inherit name text;
    script = "printf %s \"$text\" > $out";
  };

  rehearsal = ''
    mkdir -p $out/bin
    printf '#!/bin/sh\nexec hyperhive-harness rehearsal "$@"\n' > $out/bin/claude
    chmod 755 $out/bin/claude
  '';

  format = name: generate: {
    inherit generate;
    type =
      with lib.types;
      let
        value =
          oneOf [
            bool
            int
            float
            str
            path
            (attrsOf value)
            (listOf value)
          ]
          // {
            description = "${name} value";
          };
      in
      value;
  };

  # JSON's notation of a plain value is TOML's as well.
  toTOML =
    path: table:
    let
      isTable = key: builtins.isAttrs table.${key};
      keys = builtins.attrNames table;
      line = key: "${key} = ${builtins.toJSON table.${key}}\n";
      section = key: "\n[${path}${key}]\n${toTOML "${path}${key}." table.${key}}";
    in
    lib.concatStrings (
      map line (builtins.filter (key: !isTable key) keys) ++ map section (builtins.filter isTable keys)
    );

  python3 = named "python3" // {
    withPackages = choose: package {
      pname = "python3-env";
      chosen = map (one: one.pname) (choose python3.pkgs);
    };
    pkgs = lib.genAttrs [ "bottle" "waitress" ] named;
  };

  packages = lib.genAttrs [
    "coreutils"
    "findutils"
    "git"
    "gnugrep"
    "gnumake"
    "gnused"
    "makeWrapper"
    "nodejs"
    "ripgrep"
    "ruff"
    "systemd"
  ] named // {
    inherit lib python3 writeText;
    inherit (lib) types;
    claude-code = package { pname = "claude-code"; unfree = true; meta.mainProgram = "claude"; script = rehearsal; };
    unrar = package { pname = "unrar"; unfree = true; };
    formats.toml = _: format "TOML" (name: value: writeText name (toTOML "" value));
    formats.json = _: format "JSON" (name: value: writeText name (builtins.toJSON value));
    mkShell = _: named "shell";
    path = ./.;
    stdenv.hostPlatform = { inherit system; };
    stdenvNoCC.mkDerivation =
      attrs: package (attrs // { script = ''
        cp -r ${attrs.src}/. .
        . ${./stdenv.sh}
        ${attrs.installPhase}
      ''; });
    testers.runNixOSTest =
      test:
      let
        nodes = builtins.mapAttrs (_: node: (import ./nixos.nix { inherit lib; } {
          modules = [ node { nixpkgs.hostPlatform = system; } ];
        }).config.system.build.toplevel) test.nodes;
      in
      package { pname = test.name; inherit nodes; text = builtins.toJSON nodes + test.testScript; };
  };
in
builtins.foldl' (before: overlay: let after = before // overlay after before; in after) packages overlays
