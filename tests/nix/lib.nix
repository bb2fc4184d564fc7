# A stand-in for the `lib` of nixpkgs: as much of it as module.nix and flake.nix use, with the same names and the
# same meaning. The module system is here so that types, defaults, merging, priorities and unknown options are
# checked as the real one checks them: it says no where that says no, with the name of the option.
let
  inherit (builtins)
    all
    attrNames
    concatLists
    concatMap
    concatStringsSep
    elem
    filter
    genList
    hasAttr
    head
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    mapAttrs
    match
    removeAttrs
    replaceStrings
    split
    stringLength
    substring
    ;

  # ── lists, sets, strings ──

  unique = list: attrNames (listToAttrs (map (name: { inherit name; value = null; }) list));
  optional = condition: value: if condition then [ value ] else [ ];
  isDerivation = value: isAttrs value && value.type or null == "derivation";
  isStringLike = value: isString value || isPath value || value ? outPath;
  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  genAttrs = names: f: listToAttrs (map (name: { inherit name; value = f name; }) names);
  mapAttrsToList = f: set: map (name: f name set.${name}) (attrNames set);

  # How a value is shown in an error.
  show =
    value:
    if isDerivation value then
      "<derivation>"
    else if isFunction value then
      "<function>"
    else if isAttrs value then
      "{ ${concatStringsSep " " (mapAttrsToList (name: entry: "${name} = ${show entry};") value)} }"
    else if isList value then
      "[ ${concatStringsSep " " (map show value)} ]"
    else
      builtins.toJSON value;

  # ── options and properties ──

  mkOption = declaration: declaration // { _type = "option"; };
  isOption = value: isAttrs value && value._type or null == "option";
  mkEnableOption =
    name:
    mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether to enable ${name}.";
    };
  literal = kind: text: { inherit text; _type = kind; };

  mkMerge = contents: { inherit contents; _type = "merge"; };
  mkIf = condition: content: { inherit condition content; _type = "if"; };
  mkOverride = priority: content: { inherit priority content; _type = "override"; };
  mkOptionDefault = mkOverride 1500;
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  kindOf = value: if isAttrs value then value._type or "" else "";

  # Properties move from a set to its attributes, so that the names are known before any condition is.
  pushDown =
    value:
    {
      merge = concatMap pushDown value.contents;
      "if" = map (mapAttrs (_: mkIf value.condition)) (pushDown value.content);
      override = map (mapAttrs (_: mkOverride value.priority)) (pushDown value.content);
    }
    .${kindOf value} or [ value ];

  # What holds of a definition, as a list of { file, value, priority }.
  discharge =
    { file, value, priority ? 100 }:
    {
      merge = concatMap (content: discharge { inherit file priority; value = content; }) value.contents;
      "if" = if value.condition then discharge { inherit file priority; value = value.content; } else [ ];
      override = discharge { inherit file; inherit (value) priority; value = value.content; };
    }
    .${kindOf value} or [ { inherit file value priority; } ];

  where = defs: concatStringsSep "" (map (def: "\n- In `${def.file}': ${show def.value}") defs);
  showOption = concatStringsSep ".";

  # The one value of an option of this type from its definitions; `found` is false where there is none.
  mergeDefinitions =
    loc: type: defs:
    let
      holding = concatMap discharge defs;
      strongest = builtins.foldl' (low: def: if def.priority < low then def.priority else low) 9999 holding;
      winners = filter (def: def.priority == strongest) holding;
      wrong = filter (def: !type.check def.value) winners;
    in
    {
      found = winners != [ ];
      value =
        if wrong != [ ] then
          throw "A definition for option `${showOption loc}' is not of type `${type.description}'. Definition values:${where wrong}"
        else
          type.merge loc winners;
    };

  # ── types ──

  mergeEqual =
    loc: defs:
    if all (def: def.value == (head defs).value) (builtins.tail defs) then
      (head defs).value
    else
      throw "The option `${showOption loc}' has conflicting definition values:${where defs}";

  mkType =
    description: check:
    { merge ? mergeEqual }:
    { inherit description check merge; };

  simple = description: check: mkType description check { };

  types = rec {
    bool = simple "boolean" isBool;
    int = simple "signed integer" isInt;
    float = simple "floating point number" isFloat;
    str = simple "string" isString;
    path = simple "absolute path" (value: isStringLike value && substring 0 1 "${toString value}" == "/");
    package = simple "package" (value: isDerivation value || (isStringLike value && hasPrefix builtins.storeDir (toString value)));
    raw = simple "raw value" (_: true);
    lines = mkType "strings concatenated with \"\\n\"" isString {
      merge = _: defs: concatStringsSep "\n" (map (def: def.value) defs);
    };

    ints.positive = simple "positive integer, meaning >0" (value: isInt value && value > 0);
    numbers.nonnegative = simple "nonnegative integer or floating point number, meaning >=0" (
      value: (isInt value || isFloat value) && value >= 0
    );
    port = simple "16 bit unsigned integer; between 0 and 65535 (both inclusive)" (
      value: isInt value && value >= 0 && value <= 65535
    );
    enum = values: simple "one of ${concatStringsSep ", " (map show values)}" (value: elem value values);
    strMatching =
      pattern:
      simple "string matching the pattern ${pattern}" (value: isString value && match pattern value != null);

    nullOr = type: either (simple "null" isNull) type;
    oneOf = list: builtins.foldl' either (head list) (builtins.tail list);
    either =
      one: other:
      mkType "${one.description} or ${other.description}" (value: one.check value || other.check value) {
        merge =
          loc: defs: if all (def: one.check def.value) defs then one.merge loc defs else other.merge loc defs;
      };

    listOf =
      type:
      mkType "list of ${type.description}" isList {
        merge =
          loc: defs:
          let
            entry = def: at: { inherit (def) file; value = builtins.elemAt def.value at; };
            entries = concatMap (def: genList (entry def) (length def.value)) defs;
            merged = map (def: mergeDefinitions (loc ++ [ "[entry]" ]) type [ def ]) entries;
          in
          map (one: one.value) (filter (one: one.found) merged);
      };

    attrsOf =
      type:
      mkType "attribute set of ${type.description}" isAttrs {
        merge =
          loc: defs:
          let
            flat = concatMap (def: map (value: { inherit (def) file; inherit value; }) (pushDown def.value)) defs;
            names = unique (concatMap (def: attrNames def.value) flat);
            defsOf =
              name: concatMap (def: optional (hasAttr name def.value) { inherit (def) file; value = def.value.${name}; }) flat;
            merged = genAttrs names (name: mergeDefinitions (loc ++ [ name ]) type (defsOf name));
          in
          mapAttrs (_: one: one.value) (removeAttrs merged (filter (name: !merged.${name}.found) names));
      };

    submodule =
      module:
      mkType "submodule" (value: isAttrs value || isFunction value) {
        merge =
          prefix: defs:
          (evalModules {
            inherit prefix;
            modules = [ module ] ++ map (def: { _file = def.file; config = def.value; }) defs;
          }).config;
      };
  };

  # ── evaluation of modules ──

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      args = { inherit config lib options; } // specialArgs;

      load =
        module:
        let
          content = if isPath module || isString module then import module else module;
          body = if isFunction content then content args else content;
          known = [ "_file" "config" "imports" "options" ];
          wholly = body ? config || body ? options;
          alien = removeAttrs body known;
          file = body._file or (if isPath module then toString module else "<unknown-file>");
        in
        if wholly && alien != { } then
          throw "Module `${file}' has an unsupported attribute `${head (attrNames alien)}'."
        else
          [
            {
              inherit file;
              options = body.options or { };
              config = if wholly then body.config or { } else removeAttrs body known;
            }
          ]
          ++ concatMap load (body.imports or [ ]);

      loaded = concatMap load modules;

      # Declarations: one tree of all modules.
      declare =
        loc: trees:
        if filter isOption trees == [ ] then
          genAttrs (unique (concatMap attrNames trees)) (
            name: declare (loc ++ [ name ]) (concatMap (tree: optional (hasAttr name tree) tree.${name}) trees)
          )
        else if length trees == 1 then
          head trees
        else
          throw "The option `${showOption loc}' is already declared.";

      # Values: a set of the same shape, and of each definition that no option was declared for, where it is.
      evaluate =
        loc: tree: defs:
        if isOption tree then
          let
            default = optional (tree ? default) { file = "its default"; value = mkOptionDefault tree.default; };
            merged = mergeDefinitions loc tree.type (defs ++ default);
          in
          {
            unknown = [ ];
            value =
              if merged.found then
                merged.value
              else
                throw "The option `${showOption loc}' was accessed but has no value defined. Try setting the option.";
          }
        else
          let
            flat = concatMap (def: map (value: { inherit (def) file; inherit value; }) (pushDown def.value)) defs;
            defsOf =
              name: concatMap (def: optional (hasAttr name def.value) { inherit (def) file; value = def.value.${name}; }) flat;
            below = mapAttrs (name: subtree: evaluate (loc ++ [ name ]) subtree (defsOf name)) tree;
            alien =
              def:
              map (name: { inherit (def) file; loc = loc ++ [ name ]; }) (
                attrNames (removeAttrs def.value (attrNames tree))
              );
          in
          {
            value = mapAttrs (_: one: one.value) below;
            unknown = concatMap alien flat ++ concatLists (mapAttrsToList (_: one: one.unknown) below);
          };

      options = declare prefix (map (module: module.options) loaded);
      evaluated = evaluate prefix options (map (module: { inherit (module) file; value = module.config; }) loaded);
      config =
        if evaluated.unknown == [ ] then
          evaluated.value
        else
          let
            first = head evaluated.unknown;
          in
          throw "The option `${showOption first.loc}' does not exist. Definition values:\n- In `${first.file}'";
    in
    {
      inherit config options;
    };

  # ── what is exported ──

  lib = {
    inherit
      evalModules
      genAttrs
      hasPrefix
      isDerivation
      isOption
      mapAttrsToList
      mkDefault
      mkEnableOption
      mkForce
      mkIf
      mkMerge
      mkOption
      types
      ;
    concatStrings = concatStringsSep "";
    escape = characters: replaceStrings characters (map (character: "\\${character}") characters);
    getExe = package: "${package}/bin/${package.meta.mainProgram}";
    getName = package: if isString package then head (match "(.*)-[0-9].*" package) else package.pname;
    importTOML = file: builtins.fromTOML (builtins.readFile file);
    licenses.mit = { spdxId = "MIT"; };
    literalExpression = literal "literalExpression";
    literalMD = literal "literalMD";
    optionalString = condition: text: if condition then text else "";
    platforms.linux = [ "x86_64-linux" "aarch64-linux" ];
    removePrefix = prefix: text: if hasPrefix prefix text then substring (stringLength prefix) (-1) text else text;
    splitString = separator: text: filter isString (split (replaceStrings [ "." ] [ "\\." ] separator) text);
    trivial.release = "25.11";
  };
in
lib
