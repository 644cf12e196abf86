//! From files and the environment to a [`Config`], or to everything that is wrong with them.
//!
//! The file's own text knows the lines, the schema knows the keys and what they may hold, serde knows the types. A fault
//! names all of it: file, line, key, what is wrong, what is allowed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use inference::Protocol;
use membership::{Descriptor, EngineDescriptor, Frame, SLOTS_MAX, STREAM_BYTES_MAX};
use serde_json::Value as Schema;
use toml::{
    Table, Value,
    de::{DeArray, DeTable, DeValue},
};

use super::{Config, ENTRIES_MAX, IdentitySource, SEEDS_MAX, json_schema, policy};

/// Engines are not checked more often, nor given less time to answer.
const HEALTH_MIN: Duration = Duration::from_millis(50);
/// Longest file we read. A real one has a few kilobytes.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// Faults listed at most; mending these comes first anyway.
const FAULTS_MAX: usize = 50;
/// What environment variables that set keys begin with, and what stands between the parts of a key.
const ENVIRONMENT: &str = "ISOBAR_";
const SEPARATOR: &str = "__";
/// Says what is logged; it sets no key.
const LOG: &str = "ISOBAR_LOG";

/// Everything that is wrong with a configuration. The operator can mend it; nothing was started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// What is wrong, in the order of the files. Never empty.
    pub faults: Vec<Fault>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().take(FAULTS_MAX).enumerate() {
            if index > 0 {
                f.write_str("\n       ")?;
            }
            fault.fmt(f)?;
        }
        match self.faults.len().saturating_sub(FAULTS_MAX) {
            0 => Ok(()),
            more => write!(f, "\n       and {more} more"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it stands.
    pub place: Place,
    /// The key, such as `engine[0].slots`; empty when the fault is about a whole file.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// What the key may hold, from its documentation.
    pub allowed: Option<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)?;
        match &self.allowed {
            Some(allowed) => write!(f, " (allowed: {allowed})"),
            None => Ok(()),
        }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of a file, counted from 1; 0 for the whole file.
    File(PathBuf, usize),
    /// An environment variable.
    Environment(String),
    /// The name of the machine.
    Host,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, 0) => write!(f, "{}", path.display()),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Host => f.write_str("the host name"),
        }
    }
}

impl Config {
    /// Reads `path`, then `conf.d/*.toml` beside it in the order of their names, then `environment` (pairs of name and
    /// value that begin with `ISOBAR_`). Tables merge, arrays of tables grow, and a key may be set once in the files;
    /// the environment overrides them. Hidden files are passed over: editors leave them behind.
    ///
    /// # Errors
    /// [`ConfigError`] with everything that is wrong.
    pub fn load(path: &Path, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let mut loader = Loader::new(path);
        for file in files(path)? {
            loader.file(&file);
        }
        for (name, value) in environment.iter().filter(|(name, _)| name != LOG) {
            loader.variable(name, value);
        }
        loader.host_name();
        loader.finish()
    }
}

/// The main file and the parts beside it.
fn files(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut files = vec![path.to_owned()];
    let parts = path.parent().unwrap_or_else(|| Path::new("")).join("conf.d");
    match fs::read_dir(&parts) {
        Ok(entries) => {
            let mut found: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
            found.retain(|file| {
                let is_hidden =
                    file.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
                !is_hidden && file.extension().is_some_and(|extension| extension == "toml")
            });
            found.sort();
            files.append(&mut found);
            Ok(files)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(files),
        Err(error) => Err(one(Place::File(parts, 0), &format!("cannot be listed: {error}"))),
    }
}

fn one(place: Place, problem: &str) -> ConfigError {
    let fault = Fault { place, key: String::new(), problem: problem.to_owned(), allowed: None };
    ConfigError { faults: vec![fault] }
}

/// Collects values, where each came from, and what is wrong.
struct Loader {
    main: PathBuf,
    schema: Schema,
    table: Table,
    places: BTreeMap<String, Place>,
    faults: Vec<Fault>,
}

impl Loader {
    fn new(main: &Path) -> Self {
        Self {
            main: main.to_owned(),
            schema: json_schema(),
            table: Table::new(),
            places: BTreeMap::new(),
            faults: Vec::new(),
        }
    }

    fn fault(&mut self, place: Place, key: &str, problem: impl Into<String>) {
        // A fault of a whole file is about no key.
        let allowed = Some(key).filter(|key| !key.is_empty());
        let allowed = allowed.and_then(|key| lookup(&self.schema, key)).and_then(description);
        self.faults.push(Fault { place, key: key.to_owned(), problem: problem.into(), allowed });
    }

    fn file(&mut self, path: &Path) {
        let text = match read(path) {
            Ok(text) => text,
            Err(problem) => return self.fault(Place::File(path.to_owned(), 0), "", problem),
        };
        let lines = Lines::new(path, &text);
        match DeTable::parse(&text) {
            Ok(table) => {
                let table = table.into_inner();
                let schema = self.schema.clone();
                let mut merged = std::mem::take(&mut self.table);
                self.merge(&table, &schema, "", &lines, &mut merged);
                self.table = merged;
            }
            Err(error) => {
                let place = lines.place(error.span().map_or(0, |span| span.start));
                self.fault(place, "", format!("not TOML: {}", error.message()));
            }
        }
    }

    /// Merges a table of a file into what is known, looking up every key in the schema.
    fn merge(
        &mut self,
        from: &DeTable<'_>,
        schema: &Schema,
        prefix: &str,
        lines: &Lines<'_>,
        into: &mut Table,
    ) {
        let mut entries: Vec<_> = from.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (name, value) in entries {
            let place = lines.place(name.span().start);
            let name: &str = name.get_ref();
            let key = join(prefix, name);
            let Some(child) = property(&self.schema, schema, name) else {
                let problem = unknown(&self.schema, schema, name);
                self.faults.push(Fault { place, key, problem, allowed: None });
                continue;
            };
            let items = items_of(&self.schema, &child);
            let wants_table = is_table(&self.schema, &child);
            let wants_tables = is_table(&self.schema, &items);
            match value.get_ref() {
                DeValue::Table(table) if wants_table => {
                    self.places.entry(key.clone()).or_insert(place);
                    let known = into.entry(name).or_insert_with(|| Table::new().into());
                    if let Value::Table(known) = known {
                        self.merge(table, &child, &key, lines, known);
                    }
                }
                DeValue::Table(_) if wants_tables => {
                    self.fault(place, &key, format!("it is a list of tables: write [[{key}]]"));
                }
                DeValue::Table(_) => self.fault(place, &key, "it is no table"),
                DeValue::Array(array) if wants_table && all_tables(array) => {
                    self.fault(place, &key, format!("it is one table: write [{key}]"));
                }
                DeValue::Array(array) if wants_tables && all_tables(array) => {
                    let known = into.entry(name).or_insert_with(|| Value::Array(vec![]));
                    let Value::Array(known) = known else { continue };
                    for item in array {
                        let DeValue::Table(table) = item.get_ref() else { continue };
                        let key = format!("{key}[{}]", known.len());
                        self.places.insert(key.clone(), lines.place(item.span().start));
                        let mut entry = Table::new();
                        self.merge(table, &items, &key, lines, &mut entry);
                        known.push(entry.into());
                    }
                }
                DeValue::Datetime(when) => {
                    self.fault(place, &key, format!("{when} is a date: write it in quotes"));
                }
                scalar => {
                    if let Some(before) = self.places.get(&key).filter(|_| into.contains_key(name))
                    {
                        let problem =
                            format!("it is set already, in {before}: keep one of the two");
                        self.faults.push(Fault { place, key, problem, allowed: None });
                        continue;
                    }
                    self.places.insert(key, place);
                    into.insert(name.to_owned(), plain(scalar));
                }
            }
        }
    }

    /// Sets a key from the environment: `ISOBAR_LISTEN__CLIENTS` is `listen.clients`.
    fn variable(&mut self, name: &str, value: &str) {
        if is_service_link(name) {
            return;
        }
        let place = Place::Environment(name.to_owned());
        let path = name.strip_prefix(ENVIRONMENT).unwrap_or(name).to_lowercase();
        let parts: Vec<_> = path.split(SEPARATOR).collect();
        let mut schema = self.schema.clone();
        for part in &parts {
            let Some(child) = property(&self.schema, &schema, part) else {
                let problem = unknown(&self.schema, &schema, part);
                self.faults.push(Fault { place, key: parts.join("."), problem, allowed: None });
                return;
            };
            schema = child;
        }
        let Some((last, tables)) = parts.split_last() else { return };
        let mut table = &mut self.table;
        for part in tables {
            let child = table.entry(*part).or_insert_with(|| Table::new().into());
            let Value::Table(child) = child else { return };
            table = child;
        }
        table.insert((*last).to_owned(), typed(&self.schema, &schema, value));
        let key = parts.join(".");
        // What the files said below this key is gone.
        self.places.retain(|known, _| {
            !known.strip_prefix(&key).is_some_and(|rest| rest.starts_with(['.', '[']))
        });
        self.places.insert(key, place);
    }

    /// A node without a name is called as its host is.
    fn host_name(&mut self) {
        let node = self.table.entry("node").or_insert_with(|| Table::new().into());
        let Value::Table(node) = node else { return };
        if node.contains_key("name") {
            return;
        }
        let name = rustix::system::uname();
        let host = name.nodename().to_string_lossy().to_lowercase();
        let label = host.split('.').next().unwrap_or_default().replace('_', "-");
        node.insert("name".to_owned(), label.into());
        self.places.insert("node.name".to_owned(), Place::Host);
    }

    /// Reads what was merged. A value of the wrong type or content is noted, taken out, and the rest is read again, so
    /// that one run names every fault.
    fn finish(mut self) -> Result<Config, ConfigError> {
        let mut removed = BTreeSet::new();
        let config = loop {
            let read = serde_path_to_error::deserialize(Value::Table(self.table.clone()));
            match read {
                Ok(config) => break Some(config),
                Err(error) => {
                    let key = error.path().to_string();
                    let key = if key == "." { String::new() } else { key };
                    let error = error.into_inner();
                    if missing_field(&error)
                        .is_some_and(|field| removed.contains(&join(&key, field)))
                    {
                        // It is missing because it was faulty, and that has been said.
                        break None;
                    }
                    let place = self.place_of(&key);
                    let problem = self.problem(&key, &error);
                    self.fault(place, &key, problem);
                    if !remove(&mut self.table, &key) || self.faults.len() >= FAULTS_MAX {
                        break None;
                    }
                    removed.insert(key);
                }
            }
        };
        if let Some(config) = &config {
            self.check(config);
        }
        match config {
            Some(config) if self.faults.is_empty() => Ok(config),
            _ => Err(ConfigError { faults: self.faults }),
        }
    }

    /// What serde says, in words an operator uses.
    fn problem(&self, key: &str, error: &toml::de::Error) -> String {
        let message = error.message();
        if let Some(field) = missing_field(error) {
            let about = lookup(&self.schema, &join(key, field)).and_then(description);
            return format!("{field} is missing: {}", about.unwrap_or_default());
        }
        // What may be a secret is not repeated.
        let is_secret = lookup(&self.schema, key)
            .is_some_and(|schema| schema.get("writeOnly").is_some_and(|secret| *secret == true));
        let shown = find(&self.table, key).filter(|_| !is_secret).map(|value| {
            let text = match value {
                // On one line, whatever it holds.
                Value::String(text) => format!("{text:?}"),
                other => other.to_string(),
            };
            if text.chars().count() > 60 {
                text.chars().take(60).collect::<String>() + "…"
            } else {
                text
            }
        });
        match shown {
            Some(shown) => format!("{shown} will not do: {message}"),
            None => message.to_owned(),
        }
    }

    /// Where a key was set, or the table it would stand in.
    fn place_of(&self, key: &str) -> Place {
        let mut key = key;
        loop {
            if let Some(place) = self.places.get(key) {
                return place.clone();
            }
            match key.rfind(['.', '[']) {
                Some(end) => key = &key[..end],
                None => return Place::File(self.main.clone(), 0),
            }
        }
    }

    /// What no single key shows.
    fn check(&mut self, config: &Config) {
        let mut names = BTreeSet::new();
        for (index, engine) in config.engines.iter().enumerate() {
            if !names.insert(&engine.name) {
                self.conflict(
                    &format!("engine[{index}].name"),
                    format!("two engines are called {}", engine.name),
                );
            }
        }
        let mut ids = BTreeSet::new();
        for (index, engine) in config.engines.iter().enumerate() {
            if let Some(id) = &engine.id
                && !ids.insert(id)
            {
                let problem = format!(
                    "two engines of this node have the id {id}: it is what *other* nodes that front the same engine call it"
                );
                self.conflict(&format!("engine[{index}].id"), problem);
            }
        }
        for (index, engine) in config.engines.iter().enumerate() {
            if engine.protocol == Protocol::Grpc && !engine.models.is_empty() {
                let problem = "an engine of protocol grpc is never looked into, so its calls name no model: \
                               leave models out, or set protocol = \"kserve-v2\"";
                self.conflict(&format!("engine[{index}].models"), problem.to_owned());
            }
        }
        let mut names = BTreeSet::new();
        for (index, peer) in config.mesh.peers.iter().enumerate() {
            let key = format!("mesh.peer[{index}].name");
            if peer.name == config.node.name {
                self.conflict(&key, format!("{} is this node itself", peer.name));
            } else if !names.insert(&peer.name) {
                self.conflict(&key, format!("two peers are called {}", peer.name));
            }
        }
        for (key, count) in
            [("engine", config.engines.len()), ("mesh.peer", config.mesh.peers.len())]
        {
            if count > ENTRIES_MAX {
                self.conflict(key, format!("{count} are more than {ENTRIES_MAX}"));
            }
        }
        match (&config.tls.cert, &config.tls.key) {
            (Some(_), None) => self.conflict("tls.cert", "it needs tls.key beside it".into()),
            (None, Some(_)) => self.conflict("tls.key", "it needs tls.cert beside it".into()),
            _ => {}
        }
        for (key, problem) in policy::check(config) {
            self.conflict(&key, problem);
        }
        self.check_identity(config);
        if config.mesh.seeds.len() > SEEDS_MAX {
            let problem = format!("{} are more than {SEEDS_MAX}", config.mesh.seeds.len());
            self.conflict("mesh.seeds", problem);
        }
        let listen = &config.listen;
        // Key, address, whether it takes the port of TCP, and that of UDP.
        let mut ports: Vec<(&str, SocketAddr, bool, bool)> = Vec::new();
        let all = [
            ("listen.clients", Some(listen.clients), true, true),
            ("listen.peers", Some(listen.peers), true, true),
            ("listen.gossip", Some(listen.gossip), true, true),
            ("listen.plaintext", listen.plaintext, true, false),
            ("listen.metrics", Some(listen.metrics), true, false),
            ("listen.admin", Some(listen.admin), true, false),
        ];
        for (key, address, tcp, udp) in all {
            let Some(address) = address else { continue };
            let taken = ports.iter().find(|(_, taken, has_tcp, has_udp)| {
                overlap(*taken, address) && ((tcp && *has_tcp) || (udp && *has_udp))
            });
            if let Some((other, ..)) = taken {
                self.conflict(key, format!("{address} is taken by {other} already"));
            }
            ports.push((key, address, tcp, udp));
        }
        // What others must be able to read.
        let bytes = descriptor_bytes(config);
        if bytes > STREAM_BYTES_MAX {
            let problem = format!(
                "names and models of the engines make {bytes} bytes, and other nodes read {STREAM_BYTES_MAX}: \
                 split them among nodes"
            );
            self.conflict("engine", problem);
        }
        for (index, engine) in config.engines.iter().enumerate() {
            if let Some(slots) = engine.slots.filter(|slots| slots.get() > SLOTS_MAX) {
                let key = format!("engine[{index}].slots");
                self.conflict(&key, format!("{slots} is more than {SLOTS_MAX}"));
            }
            for (key, wait) in
                [("interval", engine.health.interval), ("timeout", engine.health.timeout)]
            {
                if Duration::from(wait) < HEALTH_MIN {
                    let key = format!("engine[{index}].health.{key}");
                    self.conflict(&key, format!("{wait} is shorter than {HEALTH_MIN:?}"));
                }
            }
        }
    }

    /// Keys that another source of the identity would use.
    fn check_identity(&mut self, config: &Config) {
        let identity = &config.identity;
        let is = |source| identity.source == source;
        let keys = [
            ("identity.ca", identity.ca.is_some(), IdentitySource::Files),
            ("identity.cert", identity.cert.is_some(), IdentitySource::Files),
            ("identity.key", identity.key.is_some(), IdentitySource::Files),
            ("identity.socket", identity.socket.is_some(), IdentitySource::Spire),
        ];
        for (key, is_set, source) in keys {
            if is_set && !is(source) {
                let source = format!("{source:?}").to_lowercase();
                self.conflict(key, format!("it is used with identity.source = \"{source}\" only"));
            }
        }
        if config.authority.dir.is_some() && !is(IdentitySource::Mesh) {
            let problem = "a node that holds the authority signs its own certificate: leave identity.source out";
            self.conflict("authority.dir", problem.to_owned());
        }
    }

    fn conflict(&mut self, key: &str, problem: String) {
        let place = self.place_of(key);
        self.faults.push(Fault { place, key: key.to_owned(), problem, allowed: None });
    }
}

/// Whether a variable is one of those Kubernetes sets for a Service called `isobar` or `isobar-…`: they are no keys.
fn is_service_link(name: &str) -> bool {
    let rest = name.strip_prefix(ENVIRONMENT).unwrap_or(name);
    !rest.contains(SEPARATOR)
        && (rest == "PORT"
            || rest.starts_with("PORT_")
            || rest.ends_with("_PORT")
            || ["SERVICE_HOST", "SERVICE_PORT", "_PORT_"].iter().any(|part| rest.contains(part)))
}

/// The key serde misses, if that is what it says.
fn missing_field(error: &toml::de::Error) -> Option<&str> {
    error.message().strip_prefix("missing field ").map(|field| field.trim_matches('`'))
}

/// How many bytes this node will say of its engines.
fn descriptor_bytes(config: &Config) -> usize {
    let engines = config.engines.iter().map(|engine| EngineDescriptor {
        name: engine.name.clone(),
        protocol: engine.protocol.to_string(),
        models: engine.models.clone(),
        services: Vec::new(),
        id: engine.id.clone(),
        slots: engine.slots.map(NonZeroU32::get),
    });
    let descriptor = Descriptor { version: u32::MAX, engines: engines.collect() };
    membership::encode(&Frame::Descriptor(descriptor)).len()
}

/// Whether two listeners want the same port. Port 0 never does; `[::]` takes IPv4 too.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |all: SocketAddr, one: SocketAddr| {
        all.ip().is_unspecified() && (all.is_ipv6() || one.is_ipv4())
    };
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

fn read(path: &Path) -> Result<String, String> {
    let remedy = "give the path of a TOML file";
    let metadata =
        fs::metadata(path).map_err(|error| format!("cannot be read: {error}: {remedy}"))?;
    if !metadata.is_file() {
        return Err(format!("is not a file: {remedy}"));
    }
    if metadata.len() > FILE_MAX_BYTES {
        return Err(format!("is longer than {FILE_MAX_BYTES} bytes: {remedy}"));
    }
    let bytes = fs::read(path).map_err(|error| format!("cannot be read: {error}: {remedy}"))?;
    String::from_utf8(bytes).map_err(|error| {
        format!("is not UTF-8 from byte {} on: {remedy}", error.utf8_error().valid_up_to())
    })
}

/// Byte offsets of a file as lines.
struct Lines<'a> {
    path: &'a Path,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, text: &str) -> Self {
        let starts = text.match_indices('\n').map(|(at, _)| at + 1);
        Self { path, starts: starts.collect() }
    }

    fn place(&self, offset: usize) -> Place {
        let line = 1 + self.starts.partition_point(|start| *start <= offset);
        Place::File(self.path.to_owned(), line)
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// A value without its spans.
fn plain(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        // A number TOML can spell and we cannot hold stays a text, which the key then refuses.
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Integer),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_| Value::String(number.as_str().to_owned()), Value::Float),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Datetime(when) => Value::Datetime(*when),
        DeValue::Array(items) => Value::Array(items.iter().map(|i| plain(i.get_ref())).collect()),
        DeValue::Table(table) => Value::Table(
            table.iter().map(|(k, v)| (k.get_ref().to_string(), plain(v.get_ref()))).collect(),
        ),
    }
}

/// The value of an environment variable: TOML where that is what the key wants, otherwise the text itself, so that a text
/// needs no quotes.
fn typed(root: &Schema, schema: &Schema, value: &str) -> Value {
    let wants_text =
        alternatives(root, schema).any(|s| has_type(s, "string") || s.get("enum").is_some());
    if let Ok(mut table) = format!("value = {value}").parse::<Table>()
        && let Some(value) = table.remove("value")
        && table.is_empty()
        && (!wants_text || value.is_str())
    {
        return value;
    }
    Value::String(value.to_owned())
}

fn has_type(schema: &Schema, wanted: &str) -> bool {
    match schema.get("type") {
        Some(Schema::String(one)) => one == wanted,
        Some(Schema::Array(several)) => several.iter().any(|one| one == wanted),
        _ => false,
    }
}

/// A schema and what it refers to or offers: `$ref`, `anyOf`, `oneOf`.
fn alternatives<'a>(root: &'a Schema, schema: &'a Schema) -> impl Iterator<Item = &'a Schema> {
    let follow = move |schema: &'a Schema| match schema.get("$ref").and_then(Schema::as_str) {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap_or(schema),
        None => schema,
    };
    let offered = ["anyOf", "oneOf"]
        .into_iter()
        .filter_map(|word| schema.get(word).and_then(Schema::as_array))
        .flatten();
    std::iter::once(schema).chain(offered).map(follow)
}

/// The schema of a key of a table. The description of the key itself wins over that of its type.
fn property(root: &Schema, table: &Schema, name: &str) -> Option<Schema> {
    alternatives(root, table).find_map(|schema| schema.get("properties")?.get(name)).cloned()
}

/// Whether a key is a table with keys of its own.
fn is_table(root: &Schema, schema: &Schema) -> bool {
    alternatives(root, schema).any(|schema| schema.get("properties").is_some())
}

fn all_tables(array: &DeArray<'_>) -> bool {
    array.iter().all(|item| item.get_ref().is_table())
}

fn items_of(root: &Schema, array: &Schema) -> Schema {
    alternatives(root, array).find_map(|schema| schema.get("items")).cloned().unwrap_or_default()
}

/// The schema of a key such as `engine[0].slots`.
fn lookup(root: &Schema, key: &str) -> Option<Schema> {
    let mut schema = root.clone();
    for part in key.split('.').filter(|part| !part.is_empty()) {
        let (name, indices) =
            part.split_once('[').map_or((part, 0), |(n, rest)| (n, 1 + rest.matches('[').count()));
        schema = property(root, &schema, name)?;
        for _ in 0..indices {
            // What an item of a plain list may be is said at the list.
            let items = items_of(root, &schema);
            if alternatives(root, &items).any(|s| s.get("properties").is_some()) {
                schema = items;
            }
        }
    }
    Some(schema)
}

fn description(schema: Schema) -> Option<String> {
    let text = schema.get("description")?.as_str()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches('.').to_owned())
}

/// An unknown key: the nearest known one, and all there are.
fn unknown(root: &Schema, table: &Schema, name: &str) -> String {
    let known: Vec<&str> = alternatives(root, table)
        .filter_map(|schema| schema.get("properties")?.as_object())
        .flat_map(|properties| properties.keys().map(String::as_str))
        .collect();
    let nearest = known
        .iter()
        .map(|known| (strsim::jaro_winkler(name, known), known))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((_, nearest)) => format!(
            "there is no such key: did you mean {nearest}? Known here: {}",
            known.join(", ")
        ),
        None => "there is no such key, and none may stand here".to_owned(),
    }
}

/// The parts of a key such as `engine[0].slots`: `engine`, `0`, `slots`.
fn parts(key: &str) -> impl Iterator<Item = &str> {
    key.split(['.', '[']).map(|part| part.trim_end_matches(']')).filter(|part| !part.is_empty())
}

fn find<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = parts(key);
    let mut value = table.get(parts.next()?)?;
    for part in parts {
        value = match value {
            Value::Table(table) => table.get(part)?,
            Value::Array(items) => items.get(part.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(value)
}

/// Takes a faulty value out; a list or a table entry it was part of goes with it. `false`: it was not found.
fn remove(table: &mut Table, key: &str) -> bool {
    // A faulty item of a plain list takes the list; a faulty entry of an array of tables would shift the others'
    // numbers, so only its key goes, and an entry that lacks a required key ends the reading.
    let (parent, last) = match key.rfind('.') {
        Some(dot) => (&key[..dot], &key[dot + 1..]),
        None => ("", key),
    };
    let last = last.split('[').next().unwrap_or(last);
    if parent.is_empty() {
        return table.remove(last).is_some();
    }
    let mut parts = parts(parent);
    let Some(mut value) = parts.next().and_then(|first| table.get_mut(first)) else { return false };
    for part in parts {
        let next = match value {
            Value::Table(table) => table.get_mut(part),
            Value::Array(items) => part.parse::<usize>().ok().and_then(|i| items.get_mut(i)),
            _ => None,
        };
        let Some(next) = next else { return false };
        value = next;
    }
    value.as_table_mut().is_some_and(|table| table.remove(last).is_some())
}
