//! Every key with a wrong value, and everything an operator may get wrong besides.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::{Config, ConfigError, json_schema};

const PEER: &str = "[[mesh.peer]]\nname = \"b\"\nregion = \"us\"\npeers = \"b:8444\"\n";
const ENGINE: &str = "[[engine]]\nname = \"e\"\nurl = \"http://e:1\"\n";

struct Dir(tempfile::TempDir);

impl Dir {
    fn new(main: &str) -> Self {
        let dir = Self(tempfile::tempdir().unwrap());
        fs::write(dir.main(), main).unwrap();
        dir
    }

    fn main(&self) -> PathBuf {
        self.0.path().join("node.toml")
    }

    fn part(&self, name: &str, text: &str) {
        fs::create_dir_all(self.0.path().join("conf.d")).unwrap();
        fs::write(self.0.path().join("conf.d").join(name), text).unwrap();
    }

    fn load(&self, environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let environment: Vec<_> =
            environment.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Config::load(&self.main(), &environment)
    }
}

fn load(text: &str) -> Result<Config, ConfigError> {
    Dir::new(text).load(&[])
}

fn error(text: &str) -> String {
    load(text).map(|_| "no error").unwrap_err().to_string()
}

/// Key, a file in which its value is wrong, the line of the fault, and what the error must say beside file and key.
const WRONG: [(&str, &str, usize, &str); 38] = [
    ("node.name", "[node]\nname = \"Not A Name\"", 2, "1 to 63 characters"),
    ("node.region", "[node]\nname = \"a\"\nregion = 5", 3, "1 to 63 characters"),
    ("node.zone", "[node]\nzone = \"-\"", 2, "1 to 63 characters"),
    ("node.address", "[node]\naddress = \"a:8444\"", 2, "such as \"gpu-1.example\""),
    ("node.position.lat", "[node]\nposition = { lat = 91, lon = 0 }", 2, "-90 to 90"),
    ("node.position.lon", "[node.position]\nlat = 1\nlon = \"east\"", 3, "-180 to 180"),
    ("node.state_dir", "[node]\nstate_dir = 7", 2, "Directory"),
    ("node.drain_timeout", "[node]\ndrain_timeout = \"2 fortnights\"", 2, "a duration such as"),
    ("listen.clients", "[listen]\nclients = \"localhost\"", 2, "such as \"0.0.0.0:8443\""),
    ("listen.peers", "\n[listen]\npeers = \"1.2.3.4\"", 3, "such as \"0.0.0.0:8444\""),
    ("node.buffer_bytes", "[node]\nbuffer_bytes = 1000", 2, "from 16777216"),
    ("listen.gossip", "[listen]\ngossip = 8445", 2, "such as \"0.0.0.0:8445\""),
    ("listen.admin", "[listen]\nadmin = \"9090\"", 2, "such as \"127.0.0.1:9090\""),
    ("mesh.seeds", "[mesh]\nseeds = \"seed:1\"", 2, "hosts and ports such as"),
    ("identity.source", "[identity]\nsource = \"vault\"", 2, "\"files\""),
    ("identity.ca", "[identity]\nsource = \"files\"\nca = 1", 3, "roots to believe"),
    ("identity.cert", "[identity]\nsource = \"files\"\ncert = 1", 3, "own first"),
    ("identity.key", "[identity]\nsource = \"files\"\nkey = 1", 3, "readable by its owner"),
    ("identity.socket", "[identity]\nsource = \"spire\"\nsocket = 1", 3, "unix:///run"),
    ("authority.dir", "[authority]\ndir = 1", 2, "isobar ca init"),
    ("routing.idempotent", "[routing]\nidempotent = \"p.S\"", 2, "package.Service"),
    ("log.access", "[log]\naccess = 1.5", 2, "from 0 to 1"),
    ("listen.plaintext", "[listen]\nplaintext = true", 2, "such as \"127.0.0.1:8080\""),
    ("listen.metrics", "[listen]\nmetrics = \":9464\"", 2, "such as \"127.0.0.1:9464\""),
    ("tls.cert", "[tls]\ncert = 1\nkey = \"k\"", 2, "PEM, leaf first"),
    ("tls.key", "[tls]\ncert = \"c\"\nkey = []", 3, "private key"),
    ("tls.client_ca", "[tls]\nclient_ca = []", 2, "may show"),
    ("access.anonymous", "[access]\nanonymous = \"Every One\"", 2, "who show nothing"),
    ("tenant[0].name", "[[tenant]]\nname = \"The Lab\"", 2, "1 to 63 characters"),
    ("allow[0].tenant", "[[allow]]\ntenant = \"\"", 2, "any characters"),
    ("mesh.trust_domain", "[mesh]\ntrust_domain = \"Mesh!\"", 2, "1 to 255 characters"),
    (
        "mesh.peer[0].name",
        "[[mesh.peer]]\nname = \"\"\nregion = \"r\"\npeers = \"b:1\"",
        2,
        "1 to 63",
    ),
    (
        "mesh.peer[0].region",
        "[[mesh.peer]]\nname = \"b\"\nregion = 1\npeers = \"b:1\"",
        3,
        "1 to 63",
    ),
    (
        "mesh.peer[0].peers",
        "[[mesh.peer]]\nname = \"b\"\nregion = \"r\"\npeers = \"b\"",
        4,
        "host and port such as",
    ),
    (
        "mesh.peer[0].gossip",
        "[[mesh.peer]]\nname = \"b\"\nregion = \"r\"\npeers = \"b:1\"\ngossip = \"b:0\"",
        5,
        "host and port such as",
    ),
    (
        "engine[0].name",
        "[[engine]]\nname = \"GPU 0\"\nurl = \"http://e:1\"",
        2,
        "1 to 63 characters",
    ),
    ("engine[0].url", "[[engine]]\nname = \"e\"\nurl = \"https://e:1\"", 3, "http://host:port"),
    (
        "engine[0].protocol",
        "[[engine]]\nname = \"e\"\nurl = \"http://e:1\"\nprotocol = \"rest\"",
        4,
        "kserve-v2",
    ),
];

/// The same for keys that need another engine before theirs.
const WRONG_IN_ENGINE: [(&str, &str, &str); 8] = [
    ("engine[0].models", "models = \"llama\"", "a list of names"),
    ("engine[0].slots", "slots = 0", "a whole number from 1"),
    ("engine[0].id", "id = \"GPU 0\"", "they share its slots"),
    ("engine[0].health.kind", "health = { kind = \"ping\" }", "http:/path"),
    ("engine[0].health.interval", "health = { interval = \"0s\" }", "a duration such as"),
    ("engine[0].health.timeout", "health.timeout = 2", "a duration such as"),
    ("engine[0].health.failures", "health = { failures = 0 }", "a whole number from 1"),
    ("engine[0].health.successes", "health = { successes = -1 }", "a whole number from 1"),
];

/// And for those of who may call: tables with everything else they need, and what the line below holds.
const WRONG_IN_ACCESS: [(&str, &str, &str, &str); 10] = [
    ("access.jwt[0].issuer", "[[access.jwt]]\n", "issuer = 5", "1 to 512 bytes"),
    ("access.jwt[0].audience", "[[access.jwt]]\n", "audience = \"\"", "must contain"),
    ("access.jwt[0].jwks", "[[access.jwt]]\n", "jwks = \"http://keys.example/\"", "a JWK set"),
    ("access.jwt[0].tenant_claim", JWT, "tenant_claim = true", "names the tenant"),
    ("access.jwt[0].refresh", JWT, "refresh = 5", "a duration such as"),
    ("tenant[0].api_key_sha256", TENANT, "api_key_sha256 = [\"ab\"]", "64 hex digits"),
    ("tenant[0].certificates", TENANT, "certificates = [\"CN=x\"]", "URIs such as"),
    ("tenant[0].jwt", TENANT, "jwt = \"s\"", "texts of 1 to 512"),
    ("allow[0].models", ALLOW, "models = \"m\"", "a list of names"),
    ("allow[0].services", ALLOW, "services = [\"/p.S\"]", "package.Service"),
];
const JWT: &str = "[[access.jwt]]\nissuer = \"i\"\naudience = \"a\"\njwks = \"k.json\"\n";
const JWT_OF_J: &str = "[[access.jwt]]\nissuer = \"j\"\naudience = \"a\"\njwks = \"k.json\"\n";
const TENANT: &str = "[[tenant]]\nname = \"lab\"\n";
const ALLOW: &str = "[[allow]]\ntenant = \"lab\"\n";

#[test]
fn a_wrong_value_of_any_key_names_file_line_key_and_what_is_allowed() {
    for (key, text, line, allowed) in WRONG {
        let error = error(text);
        assert!(error.contains(&format!("node.toml:{line}: {key}: ")), "{key}: {error}");
        assert!(error.contains(allowed), "{key}: {error}");
    }
    for (key, text, allowed) in WRONG_IN_ENGINE {
        let error = error(&format!("{ENGINE}{text}"));
        assert!(error.contains(&format!("node.toml:4: {key}")), "{key}: {error}");
        assert!(error.contains(allowed), "{key}: {error}");
    }
    for (key, before, text, allowed) in WRONG_IN_ACCESS {
        let error = error(&format!("{before}{text}"));
        let line = 1 + before.lines().count();
        assert!(error.contains(&format!("node.toml:{line}: {key}")), "{key}: {error}");
        assert!(error.contains(allowed), "{key}: {error}");
    }
}

#[test]
fn every_key_of_the_schema_has_a_wrong_value_above() {
    let tested = WRONG.iter().map(|row| row.0).chain(WRONG_IN_ENGINE.iter().map(|row| row.0));
    let tested = tested.chain(WRONG_IN_ACCESS.iter().map(|row| row.0));
    let tested: BTreeSet<String> = tested.map(|key| key.replace("[0]", "")).collect();
    let mut known = BTreeSet::new();
    leaves(&json_schema(), &json_schema(), "", &mut known);
    assert_eq!(tested, known);
}

fn leaves(
    root: &serde_json::Value,
    schema: &serde_json::Value,
    prefix: &str,
    out: &mut BTreeSet<String>,
) {
    let reference = schema.get("$ref").and_then(|r| r.as_str()).map(|r| r.trim_start_matches('#'));
    let schema = reference.map_or(schema, |pointer| root.pointer(pointer).unwrap());
    if let Some(properties) = schema.get("properties").and_then(|p| p.as_object()) {
        for (name, child) in properties {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            leaves(root, child, &key, out);
        }
        return;
    }
    let nested = [schema.get("items"), schema.pointer("/anyOf/0")];
    match nested.into_iter().flatten().find(|nested| {
        nested.get("$ref").is_some_and(|r| {
            root.pointer(r.as_str().unwrap().trim_start_matches('#'))
                .unwrap()
                .get("properties")
                .is_some()
        })
    }) {
        Some(table) => leaves(root, table, prefix, out),
        None => {
            out.insert(prefix.to_owned());
        }
    }
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_and_all_of_them() {
    for (text, line, key, nearest) in [
        ("nod = 1", 1, "nod", "node"),
        ("[lisen]\nclients = \"x\"", 1, "lisen", "listen"),
        ("[listen]\nadmn = \"0.0.0.0:9090\"", 2, "listen.admn", "admin"),
        (
            &format!("{ENGINE}health = {{ every = \"1s\" }}"),
            4,
            "engine[0].health.every",
            "interval",
        ),
        ("[node]\nregoin = \"eu\"", 2, "node.regoin", "region"),
        ("[node]\nposition = { lat = 1, lon = 1, alt = 1 }", 2, "node.position.alt", "lat"),
        ("[tls]\nclient_cas = \"x\"", 2, "tls.client_cas", "client_ca"),
        ("[mesh]\nseed = []", 2, "mesh.seed", "seeds"),
        (&format!("{PEER}adress = \"x\""), 5, "mesh.peer[0].adress", "peers"),
        (&format!("{ENGINE}slot = 4"), 4, "engine[0].slot", "slots"),
        ("[[tenants]]\nname = \"x\"", 1, "tenants", "tenant"),
        (&format!("{TENANT}api_key = \"x\""), 3, "tenant[0].api_key", "api_key_sha256"),
    ] {
        let error = error(text);
        assert!(
            error.contains(&format!("node.toml:{line}: {key}: there is no such key")),
            "{error}"
        );
        assert!(error.contains(nearest), "{error}");
    }
}

#[test]
fn every_fault_is_named_in_one_go() {
    let error = error("[node]\nname = \"A\"\nregoin = 1\n[listen]\nclients = \"x\"\npeers = 4\n");
    for key in ["node.name", "node.regoin", "listen.clients", "listen.peers"] {
        assert!(error.contains(&format!("{key}: ")), "{key} in\n{error}");
    }
    assert_eq!(error.lines().count(), 4, "{error}");
}

#[test]
fn what_is_missing_is_named_at_its_table() {
    let error = error("\n[[engine]]\nname = \"e\"\n");
    assert!(error.contains("node.toml:2: engine[0]: url is missing"), "{error}");
    assert!(error.contains("http://host:port"), "{error}");
}

#[test]
fn a_wrong_value_of_a_required_key_is_not_also_missing() {
    let error = error("[[engine]]\nname = \"e\"\nurl = 1\n");
    assert!(!error.contains("missing"), "{error}");
}

#[test]
fn an_empty_file_means_the_defaults() {
    let config = load("[node]\nname = \"a\"").unwrap();
    assert_eq!(config.node.region.as_str(), "default");
    assert_eq!(config.node.state_dir, Path::new(".isobar"));
    assert_eq!(config.node.drain_timeout.to_string(), "2m");
    assert_eq!(config.listen.clients.to_string(), "0.0.0.0:8443");
    assert_eq!(config.listen.peers.to_string(), "0.0.0.0:8444");
    assert_eq!(config.listen.gossip.to_string(), "0.0.0.0:8445");
    assert_eq!(config.listen.admin.to_string(), "127.0.0.1:9090");
    assert_eq!(config.listen.plaintext, None);
    assert_eq!(config.node.buffer_bytes.get(), 256 << 20);
    assert!(config.routing.idempotent.is_empty() && config.log.access.get() == 0.0);
    assert_eq!(config.listen.metrics.to_string(), "127.0.0.1:9464");
    assert_eq!(config.mesh.trust_domain.as_str(), super::DEFAULT_TRUST_DOMAIN);
    assert!(config.engines.is_empty() && config.mesh.peers.is_empty());
}

#[test]
fn a_node_without_a_name_is_called_as_its_host_is_or_says_what_to_do() {
    match load("") {
        Ok(config) => assert!(!config.node.name.as_str().is_empty()),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("the host name: node.name"), "{text}");
        }
    }
}

#[test]
fn parts_of_a_configuration_merge() {
    let dir = Dir::new(&format!("[node]\nname = \"a\"\n{ENGINE}"));
    dir.part(
        "20-more.toml",
        "[listen]\nmetrics = \"127.0.0.1:1\"\n[[engine]]\nname = \"f\"\nurl = \"http://f:1\"",
    );
    dir.part(
        "10-first.toml",
        "[node]\nregion = \"eu\"\n[[engine]]\nname = \"g\"\nurl = \"http://g:1\"",
    );
    dir.part("notes.txt", "not read");
    let config = dir.load(&[]).unwrap();
    assert_eq!(config.node.region.as_str(), "eu");
    assert_eq!(config.listen.metrics.port(), 1);
    let names: Vec<_> = config.engines.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["e", "g", "f"]);
}

#[test]
fn two_engines_of_one_node_are_not_the_same_engine() {
    let both = format!(
        "{ENGINE}id = \"gpu\"\n[[engine]]\nname = \"f\"\nurl = \"http://f:1\"\nid = \"gpu\""
    );
    let error = error(&both);
    assert!(error.contains("engine[1].id: two engines of this node have the id gpu"), "{error}");
}

#[test]
fn an_engine_has_no_more_slots_than_other_nodes_believe() {
    assert!(load(&format!("[node]\nname = \"a\"\n{ENGINE}slots = 1048576")).is_ok());
    let error = error(&format!("{ENGINE}slots = 1048577"));
    assert!(error.contains("engine[0].slots: 1048577 is more than 1048576"), "{error}");
}

#[test]
fn a_fault_in_a_part_names_that_file() {
    let dir = Dir::new(&format!("[node]\nname = \"a\"\n{ENGINE}"));
    dir.part("x.toml", "\n\n[[engine]]\nname = \"f\"\nurl = \"http://f:1\"\nslots = -1");
    let error = dir.load(&[]).unwrap_err().to_string();
    assert!(error.contains("x.toml:6: engine[1].slots"), "{error}");
}

#[test]
fn a_key_set_in_two_files_names_both_places() {
    let dir = Dir::new("[node]\nname = \"a\"\nregion = \"eu\"");
    dir.part("x.toml", "[node]\nregion = \"us\"");
    let error = dir.load(&[]).unwrap_err().to_string();
    assert!(error.contains("x.toml:2: node.region: it is set already, in "), "{error}");
    assert!(error.contains("node.toml:3"), "{error}");
}

#[test]
fn the_environment_overrides_the_files() {
    let dir = Dir::new("[node]\nname = \"a\"\nregion = \"eu\"");
    let config = dir
        .load(&[
            ("ISOBAR_NODE__NAME", "9"),
            ("ISOBAR_NODE__REGION", "us"),
            ("ISOBAR_LISTEN__CLIENTS", "127.0.0.1:1"),
            ("ISOBAR_NODE__POSITION__LAT", "50.1"),
            ("ISOBAR_NODE__POSITION__LON", "8"),
        ])
        .unwrap();
    assert_eq!(config.node.name.as_str(), "9");
    assert_eq!(config.node.region.as_str(), "us");
    assert_eq!(config.listen.clients.port(), 1);
    assert!((config.node.position.unwrap().lat.degrees() - 50.1).abs() < 1e-9);

    for (name, value, want) in [
        ("ISOBAR_NODE__REGOIN", "eu", "node.regoin: there is no such key: did you mean region?"),
        ("ISOBAR_LISTEN__PEERS", "x", "listen.peers: \"x\" will not do"),
        ("ISOBAR_NODE__POSITION", "5", "node.position: 5 will not do"),
    ] {
        let error = dir.load(&[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(&format!("environment variable {name}: {want}")), "{error}");
    }
}

#[test]
fn a_variable_replaces_a_list_and_its_faults_are_its_own() {
    let dir = Dir::new(&format!("[node]\nname = \"a\"\n{ENGINE}"));
    let (good, bad) =
        ("[{ name = \"f\", url = \"http://f:1\" }]", "[{ name = \"F\", url = \"http://f:1\" }]");
    let config = dir.load(&[("ISOBAR_ENGINE", good), ("ISOBAR_NODE__REGION", "\"us\"")]).unwrap();
    assert_eq!((config.engines.len(), config.engines[0].name.as_str()), (1, "f"));
    assert_eq!(config.node.region.as_str(), "us");
    let error = dir.load(&[("ISOBAR_ENGINE", bad)]).unwrap_err().to_string();
    assert!(error.contains("environment variable ISOBAR_ENGINE: engine[0].name"), "{error}");
    assert!(dir.load(&[("ISOBAR_LOG", "debug")]).is_ok());
    // What Kubernetes sets for Services called isobar and isobar-gpu.
    for name in [
        "ISOBAR_SERVICE_HOST",
        "ISOBAR_SERVICE_PORT_GRPC",
        "ISOBAR_PORT",
        "ISOBAR_PORT_8443_TCP_ADDR",
        "ISOBAR_GPU_SERVICE_HOST",
        "ISOBAR_GPU_PORT_8443_UDP",
    ] {
        assert!(dir.load(&[(name, "tcp://10.0.0.1:8443")]).is_ok(), "{name}");
    }
}

#[test]
fn an_empty_list_in_a_part_takes_nothing_away() {
    let dir = Dir::new(&format!("[node]\nname = \"a\"\n{PEER}"));
    dir.part("x.toml", "[mesh]\npeer = []");
    dir.part(".#y.toml", "left by an editor");
    assert_eq!(dir.load(&[]).unwrap().mesh.peers.len(), 1);
}

#[test]
fn tables_lists_and_dates_in_the_wrong_place_say_what_to_write() {
    for (text, want) in [
        ("[engine]\nname = \"e\"", "node.toml:1: engine: it is a list of tables: write [[engine]]"),
        ("[[listen]]", "node.toml:1: listen: it is one table: write [listen]"),
        ("[node.region]", "node.toml:1: node.region: it is no table"),
        ("[node]\nregion = 1979-05-27", "node.toml:2: node.region: 1979-05-27 is a date"),
        ("[node]\nregion = \"\"\"a\nb\"\"\"", "node.toml:2: node.region: \"a\\nb\" will not do"),
    ] {
        let error = error(text);
        assert!(error.contains(want), "{want} is not in {error}");
    }
}

#[test]
fn addresses_of_two_families_do_not_contradict() {
    let listen = |clients, peers| {
        load(&format!(
            "[node]\nname = \"a\"\n[listen]\nclients = \"{clients}\"\npeers = \"{peers}\""
        ))
    };
    assert!(listen("0.0.0.0:8443", "[::1]:8443").is_ok());
    assert!(listen("[::]:8443", "127.0.0.1:8443").is_err());
    let gossip = |address| load(&format!("[node]\nname = \"a\"\n[listen]\ngossip = \"{address}\""));
    assert!(gossip("127.0.0.1:9464").is_err(), "metrics is TCP, gossip both");
    assert!(gossip("127.0.0.1:8443").is_err());
}

#[test]
fn files_that_are_no_configuration_say_so() {
    let dir = Dir::new("");
    let missing = Config::load(&dir.0.path().join("nope.toml"), &[]).unwrap_err().to_string();
    assert!(missing.contains("nope.toml: cannot be read"), "{missing}");
    let directory = Config::load(dir.0.path(), &[]).unwrap_err().to_string();
    assert!(directory.contains("is not a file"), "{directory}");

    fs::write(dir.main(), [b'#', 0xff, 0xfe]).unwrap();
    assert!(dir.load(&[]).unwrap_err().to_string().contains("is not UTF-8 from byte 1"));
    fs::write(dir.main(), vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(dir.load(&[]).unwrap_err().to_string().contains("is longer than"));
    let syntax = error("[node]\nname = \n");
    assert!(syntax.contains("node.toml:2: not TOML"), "{syntax}");
}

#[test]
fn what_contradicts_itself_is_refused() {
    let name = "[node]\nname = \"a\"\n";
    for (text, want) in [
        (format!("{ENGINE}{ENGINE}"), "node.toml:7: engine[1].name: two engines are called e"),
        (format!("{PEER}{PEER}"), "node.toml:8: mesh.peer[1].name: two peers are called b"),
        (
            format!("{ENGINE}protocol = \"grpc\"\nmodels = [\"m\"]"),
            "node.toml:7: engine[0].models: an engine of protocol grpc",
        ),
        (
            format!("{ENGINE}health = {{ interval = \"1ns\" }}"),
            "node.toml:6: engine[0].health.interval: 1ns is shorter than 50ms",
        ),
        (PEER.replace("\"b\"", "\"a\""), "mesh.peer[0].name: a is this node itself"),
        ("[tls]\ncert = \"c\"".into(), "tls.cert: it needs tls.key"),
        ("[tls]\nkey = \"k\"".into(), "tls.key: it needs tls.cert"),
        (
            "[listen]\nclients = \"127.0.0.1:8444\"".into(),
            "listen.peers: 0.0.0.0:8444 is taken by listen.clients",
        ),
        (
            "[listen]\nplaintext = \"127.0.0.1:9464\"".into(),
            "listen.metrics: 127.0.0.1:9464 is taken by listen.plaintext",
        ),
    ] {
        let error = error(&format!("{name}{text}"));
        assert!(error.contains(want), "{want} is not in {error}");
    }
    let engine = |i| {
        format!(
            "[[engine]]\nname = \"e{i}\"\nurl = \"http://e:1\"\nmodels = [\"{}\"]\n",
            "m".repeat(500)
        )
    };
    let long: String = (0..200).map(engine).collect();
    assert!(
        error(&format!("{name}{long}")).contains("engine: names and models of the engines make")
    );
    let many: String =
        (0..1025).map(|i| format!("[[engine]]\nname = \"e{i}\"\nurl = \"http://e:1\"\n")).collect();
    assert!(error(&format!("{name}{many}")).contains("1025 are more than 1024"));
}

/// A hash of nothing in particular.
fn hash(digit: char) -> String {
    String::from(digit).repeat(64)
}

#[test]
fn who_may_call_contradicts_itself() {
    let lab = format!("{TENANT}api_key_sha256 = \"{}\"\n", hash('a'));
    let other = "[[tenant]]\nname = \"shop\"\n";
    let (twice, upper) = (hash('a'), hash('A'));
    for (text, want) in [
        (format!("{TENANT}{TENANT}"), "node.toml:6: tenant[1].name: two tenants are called lab".to_owned()),
        (
            format!("{lab}{other}api_key_sha256 = [\"{}\", \"{upper}\"]", hash('b')),
            "node.toml:8: tenant[1].api_key_sha256: lab has one of these hashes already".to_owned(),
        ),
        (
            format!("{TENANT}api_key_sha256 = [\"{twice}\", \"{twice}\"]"),
            "tenant[0].api_key_sha256: lab has".to_owned(),
        ),
        (
            format!("[tls]\nclient_ca = \"c\"\n{TENANT}certificates = [\"a.b\"]\n{other}certificates = [\"A.B\"]"),
            "node.toml:10: tenant[1].certificates: a.b is a certificate of lab already".to_owned(),
        ),
        (
            format!("{TENANT}certificates = [\"a.b\"]"),
            "node.toml:5: tenant[0].certificates: clients are asked for a certificate only with tls.client_ca".to_owned(),
        ),
        (format!("{TENANT}jwt = [\"s\"]"), "tenant[0].jwt: nobody's tokens are believed".to_owned()),
        (
            format!("{JWT}{TENANT}jwt = [\"s\"]\n{other}jwt = [\"i#s\"]"),
            "node.toml:12: tenant[1].jwt: s stands for lab already".to_owned(),
        ),
        (
            format!("{JWT}{JWT_OF_J}{TENANT}jwt = [\"i#s\", \"s\"]"),
            "node.toml:13: tenant[0].jwt: any of several issuers could say s: write whose it is, as \"i#s\"".to_owned(),
        ),
        (
            format!("{JWT}{TENANT}jwt = [\"k#s\"]"),
            "node.toml:9: tenant[0].jwt: k#s is of the issuer k, whose tokens are not believed".to_owned(),
        ),
        (
            JWT.replace("\"i\"", "\"i#j\""),
            "node.toml:4: access.jwt[0].issuer: i#j has a # in it".to_owned(),
        ),
        (format!("{JWT}{JWT}"), "access.jwt[1].issuer: i is listed twice for a".to_owned()),
        (format!("{JWT}refresh = \"10ms\""), "access.jwt[0].refresh: 10ms is shorter than 1s".to_owned()),
        (
            format!("{TENANT}[access]\nanonymous = \"public\""),
            "node.toml:6: access.anonymous: there is no tenant public: add a [[tenant]], or name one of lab".to_owned(),
        ),
        ("[[allow]]\ntenant = \"*\"".to_owned(), "allow[0].tenant: there is no tenant *".to_owned()),
        (
            format!("{TENANT}{ALLOW}models = []\nservices = []"),
            "node.toml:7: allow[0].models: it is empty, and so allows nothing".to_owned(),
        ),
    ] {
        let error = error(&format!("[node]\nname = \"a\"\n{text}"));
        assert!(error.contains(&want), "{want} is not in {error}");
    }
}

#[test]
fn a_key_in_place_of_its_hash_is_not_repeated() {
    for wrong in ["\"sk-secret-1\"", "[\"sk-secret-1\"]", "5417235417235", "[5417235417235]"] {
        let error = error(&format!("{TENANT}api_key_sha256 = {wrong}"));
        assert!(error.contains("node.toml:3: tenant[0].api_key_sha256"), "{error}");
        assert!(error.contains("sha256sum"), "{error}");
        assert!(!error.contains("secret") && !error.contains("5417"), "{error}");
    }
}

#[test]
fn a_file_that_says_who_may_call_is_not_opened() {
    let name = "[node]\nname = \"a\"\n";
    let mut silent = load(name).unwrap();
    assert!(silent.is_closed() && silent.who_may_call().starts_with("nobody may call"));
    let opened = silent.open_for_development();
    assert_eq!(opened, ["anybody who reaches 0.0.0.0:8443 may call every model and service"]);
    assert_eq!(
        silent.who_may_call(),
        "anonymous may call (callers who show nothing are anonymous)"
    );
    assert!(silent.open_for_development().is_empty(), "it says so now");
    // An issuer speaks for nobody by itself.
    let silent = format!("{JWT}{TENANT}{ALLOW}");
    for says in [TENANT, &silent, "[tls]\nclient_ca = \"c\"", JWT, &format!("{TENANT}{ALLOW}")] {
        let mut config = load(&format!("{name}{says}")).unwrap();
        assert!(config.open_for_development().is_empty(), "{says}");
        assert!(config.is_closed(), "{says}");
    }
    let known =
        load(&format!("{name}{TENANT}api_key_sha256 = \"{}\"\n{ALLOW}", hash('a'))).unwrap();
    assert_eq!(known.who_may_call(), "lab may call");
    let claims = [(JWT, "[\"s\"]"), (JWT, "[\"i#s\"]"), (&[JWT, JWT_OF_J].concat(), "[\"j#s\"]")];
    for (issuers, claims) in claims {
        let known = load(&format!("{name}{issuers}{TENANT}jwt = {claims}\n{ALLOW}")).unwrap();
        assert_eq!(known.who_may_call(), "lab may call", "{claims}");
    }
}

#[test]
fn the_committed_schema_is_that_of_this_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config.schema.json");
    let committed = fs::read_to_string(path).unwrap_or_default();
    let current = serde_json::to_string_pretty(&json_schema()).unwrap() + "\n";
    assert!(committed == current, "run: cargo run -- schema > config.schema.json");
}

#[test]
fn the_examples_load() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/two-nodes");
    for name in ["a.toml", "b.toml"] {
        let config = Config::load(&examples.join(name), &[]);
        assert!(config.is_ok(), "{name}: {}", config.unwrap_err());
    }
}
