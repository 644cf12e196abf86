//! Which file declares a symbol? Files of protobuf declarations, looked up by name, symbol and extension.
//!
//! Declarations come from servers we do not trust: they are walked field by field within bounds, never built into types,
//! so that no file costs more than its length. What a file says of its options passes through unread. Source:
//! `google/protobuf/descriptor.proto`, for the numbers of the fields.

use std::collections::{BTreeMap, BTreeSet};

use prost::encoding::{
    DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};

/// Symbols looked up; those beyond are not found.
const SYMBOLS_MAX: usize = 65_536;
/// How deep messages may be declared in messages.
const DEPTH_MAX: usize = 32;

/// A file cannot be read. Whoever declared it is at fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeclarationError {
    /// It is no `FileDescriptorProto`.
    #[error("a declaration that cannot be read: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// It ends in the middle of a field.
    #[error("a declaration that is cut off")]
    Truncated,
    /// It has no name.
    #[error("a declaration without a name")]
    Nameless,
    /// Files import each other in a circle, which protobuf forbids.
    #[error("files that import each other in a circle: {0}")]
    Circle(String),
}

/// What a serialized `FileDescriptorProto` says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) name: String,
    pub(crate) imports: Vec<String>,
}

/// Files that fit together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Declarations {
    files: BTreeMap<String, File>,
    /// The file of each symbol.
    symbols: BTreeMap<String, String>,
    /// The file of each extension, by the message it extends and its number.
    extensions: BTreeMap<(String, i32), String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct File {
    bytes: Vec<u8>,
    imports: Vec<String>,
}

impl Declarations {
    /// Looks through serialized `FileDescriptorProto`s. Of several of one name the first counts.
    ///
    /// # Errors
    /// [`DeclarationError`]; none of the files is of use then.
    pub fn new(files: impl IntoIterator<Item = Vec<u8>>) -> Result<Self, DeclarationError> {
        let mut all = Self::default();
        for bytes in files {
            let Header { name, imports } = Header::of(&bytes)?;
            if !all.files.contains_key(&name) {
                all.index(&name, &bytes)?;
                all.files.insert(name, File { bytes, imports });
            }
        }
        all.check_circles()?;
        Ok(all)
    }

    /// The files of a serialized `FileDescriptorSet`.
    ///
    /// # Errors
    /// [`DeclarationError`].
    pub fn of_set(set: &[u8]) -> Result<Self, DeclarationError> {
        let mut files = Vec::new();
        fields(set, |number, field| {
            if let (1, Field::Bytes(file)) = (number, field) {
                files.push(file.to_vec());
            }
            Ok(())
        })?;
        Self::new(files)
    }

    /// All files, as a serialized `FileDescriptorSet`.
    #[must_use]
    pub fn to_set(&self) -> Vec<u8> {
        let mut set = Vec::new();
        for file in self.files.values() {
            encode_key(1, WireType::LengthDelimited, &mut set);
            encode_varint(file.bytes.len() as u64, &mut set);
            set.extend(&file.bytes);
        }
        set
    }

    /// A file and all it imports, itself first.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<Vec<Vec<u8>>> {
        self.files.get(name)?;
        let (mut found, mut seen, mut open) = (Vec::new(), BTreeSet::new(), vec![name]);
        while let Some(name) = open.pop() {
            if let Some(file) = self.files.get(name).filter(|_| seen.insert(name)) {
                found.push(file.bytes.clone());
                open.extend(file.imports.iter().map(String::as_str));
            }
        }
        Some(found)
    }

    /// The file that declares a service, method, message, enum or extension, and all it imports.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Vec<Vec<u8>>> {
        self.file(self.symbols.get(name.strip_prefix('.').unwrap_or(name))?)
    }

    /// The file that declares extension `number` of a message, and all it imports.
    #[must_use]
    pub fn extension(&self, message: &str, number: i32) -> Option<Vec<Vec<u8>>> {
        self.file(self.extensions.get(&(message.to_owned(), number))?)
    }

    /// The numbers of the extensions of a message; `None`: there is no such message.
    #[must_use]
    pub fn extension_numbers(&self, message: &str) -> Option<Vec<i32>> {
        self.symbols.get(message)?;
        let range = (message.to_owned(), i32::MIN)..=(message.to_owned(), i32::MAX);
        Some(self.extensions.range(range).map(|((_, number), _)| *number).collect())
    }

    fn index(&mut self, file: &str, bytes: &[u8]) -> Result<(), DeclarationError> {
        let mut package = String::new();
        fields(bytes, |number, field| {
            if let (2, Field::Bytes(name)) = (number, field) {
                package = text(name);
            }
            Ok(())
        })?;
        let mut walk = Walk { all: self, file };
        walk.scope(&package, bytes, &FILE, 0)
    }

    /// A file that is found within its own imports would be looked for without end.
    fn check_circles(&self) -> Result<(), DeclarationError> {
        // Each round takes away what imports nothing that is left; what stays imports itself.
        let mut left: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (name, file) in &self.files {
            let imports = file.imports.iter().filter(|i| self.files.contains_key(*i));
            left.insert(name, imports.map(String::as_str).collect());
        }
        let mut importers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, imports) in &left {
            for import in imports {
                importers.entry(import).or_default().push(name);
            }
        }
        let mut free: Vec<&str> =
            left.iter().filter(|(_, imports)| imports.is_empty()).map(|(name, _)| *name).collect();
        while let Some(name) = free.pop() {
            left.remove(name);
            for importer in importers.get(name).into_iter().flatten() {
                if let Some(imports) = left.get_mut(importer)
                    && imports.remove(name)
                    && imports.is_empty()
                {
                    free.push(importer);
                }
            }
        }
        match left.keys().next() {
            None => Ok(()),
            Some(name) => Err(DeclarationError::Circle((*name).to_owned())),
        }
    }
}

impl Header {
    /// Reads the name and the imports of a file, and nothing else.
    pub(crate) fn of(file: &[u8]) -> Result<Self, DeclarationError> {
        let mut header = Self::default();
        fields(file, |number, field| {
            match (number, field) {
                (1, Field::Bytes(name)) => header.name = text(name),
                (3, Field::Bytes(import)) => header.imports.push(text(import)),
                _ => {}
            }
            Ok(())
        })?;
        if header.name.is_empty() { Err(DeclarationError::Nameless) } else { Ok(header) }
    }
}

/// Where in a message that declares things its parts are.
struct Parts {
    messages: u32,
    enums: u32,
    extensions: u32,
    services: Option<u32>,
}

/// In a `FileDescriptorProto`.
const FILE: Parts = Parts { messages: 4, enums: 5, extensions: 7, services: Some(6) };
/// In a `DescriptorProto`.
const MESSAGE: Parts = Parts { messages: 3, enums: 4, extensions: 6, services: None };

struct Walk<'a> {
    all: &'a mut Declarations,
    file: &'a str,
}

impl Walk<'_> {
    /// Notes what is declared in `scope`.
    fn scope(
        &mut self,
        scope: &str,
        bytes: &[u8],
        parts: &Parts,
        depth: usize,
    ) -> Result<(), DeclarationError> {
        fields(bytes, |number, field| {
            let Field::Bytes(part) = field else { return Ok(()) };
            let is_known = number == parts.messages
                || number == parts.enums
                || number == parts.extensions
                || Some(number) == parts.services;
            if !is_known || depth > DEPTH_MAX {
                return Ok(());
            }
            let name = within(scope, &name_of(part)?);
            if number == parts.extensions {
                self.extension(part)?;
            } else if number == parts.messages {
                self.scope(&name, part, &MESSAGE, depth + 1)?;
            } else if Some(number) == parts.services {
                self.methods(&name, part)?;
            }
            self.note(name);
            Ok(())
        })
    }

    fn methods(&mut self, service: &str, bytes: &[u8]) -> Result<(), DeclarationError> {
        fields(bytes, |number, field| {
            if let (2, Field::Bytes(method)) = (number, field) {
                self.note(within(service, &name_of(method)?));
            }
            Ok(())
        })
    }

    fn extension(&mut self, bytes: &[u8]) -> Result<(), DeclarationError> {
        let (mut extended, mut number) = (String::new(), 0);
        fields(bytes, |field_number, field| {
            match (field_number, field) {
                (2, Field::Bytes(name)) => extended = text(name),
                (3, Field::Number(found)) => number = i32::try_from(found).unwrap_or(0),
                _ => {}
            }
            Ok(())
        })?;
        if self.all.extensions.len() < SYMBOLS_MAX {
            let extended = extended.trim_start_matches('.').to_owned();
            self.all.extensions.entry((extended, number)).or_insert_with(|| self.file.to_owned());
        }
        Ok(())
    }

    fn note(&mut self, symbol: String) {
        if self.all.symbols.len() < SYMBOLS_MAX {
            self.all.symbols.entry(symbol).or_insert_with(|| self.file.to_owned());
        }
    }
}

/// A field of a message, as far as it is looked at.
enum Field<'a> {
    Bytes(&'a [u8]),
    Number(u64),
}

/// Hands each field of a message to `each`.
fn fields<'a>(
    mut bytes: &'a [u8],
    mut each: impl FnMut(u32, Field<'a>) -> Result<(), DeclarationError>,
) -> Result<(), DeclarationError> {
    while !bytes.is_empty() {
        let (number, wire) = decode_key(&mut bytes)?;
        match wire {
            WireType::LengthDelimited => {
                let length = usize::try_from(decode_varint(&mut bytes)?).unwrap_or(usize::MAX);
                let Some((field, rest)) = bytes.split_at_checked(length) else {
                    return Err(DeclarationError::Truncated);
                };
                bytes = rest;
                each(number, Field::Bytes(field))?;
            }
            WireType::Varint => each(number, Field::Number(decode_varint(&mut bytes)?))?,
            _ => skip_field(wire, number, &mut bytes, DecodeContext::default())?,
        }
    }
    Ok(())
}

/// Field 1, which is the name of everything that is declared.
fn name_of(bytes: &[u8]) -> Result<String, DeclarationError> {
    let mut name = String::new();
    fields(bytes, |number, field| {
        if let (1, Field::Bytes(found)) = (number, field) {
            name = text(found);
        }
        Ok(())
    })?;
    Ok(name)
}

fn within(scope: &str, name: &str) -> String {
    if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::{
        DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto,
        MethodDescriptorProto, ServiceDescriptorProto,
    };
    use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    fn file(name: &str, imports: &[&str]) -> FileDescriptorProto {
        FileDescriptorProto {
            name: Some(name.into()),
            package: Some("p".into()),
            dependency: imports.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    fn rich() -> FileDescriptorProto {
        let field = |extendee: Option<&str>| FieldDescriptorProto {
            name: Some("f".into()),
            number: Some(1_000),
            extendee: extendee.map(Into::into),
            ..Default::default()
        };
        let message = |name: &str, nested| DescriptorProto {
            name: Some(name.into()),
            nested_type: nested,
            field: vec![field(None)],
            ..Default::default()
        };
        let values = EnumDescriptorProto { name: Some("E".into()), ..Default::default() };
        let method = MethodDescriptorProto { name: Some("M".into()), ..Default::default() };
        let service = ServiceDescriptorProto {
            name: Some("S".into()),
            method: vec![method],
            ..Default::default()
        };
        FileDescriptorProto {
            message_type: vec![message("A", vec![message("B", vec![])])],
            enum_type: vec![values],
            service: vec![service],
            extension: vec![field(Some(".p.A"))],
            ..file("rich.proto", &["other.proto"])
        }
    }

    fn names(files: Option<Vec<Vec<u8>>>) -> Vec<String> {
        files.unwrap_or_default().iter().map(|file| Header::of(file).unwrap().name).collect()
    }

    #[test]
    fn every_symbol_leads_to_its_file_and_what_that_imports() {
        let files = [rich(), file("other.proto", &[])].map(|file| file.encode_to_vec());
        let all = Declarations::new(files).unwrap();
        for symbol in ["p.A", "p.A.B", "p.E", "p.S", "p.S.M", "p.f", ".p.S"] {
            assert_eq!(names(all.symbol(symbol)), ["rich.proto", "other.proto"], "{symbol}");
        }
        assert_eq!(names(all.extension("p.A", 1_000)), ["rich.proto", "other.proto"]);
        assert_eq!(all.extension_numbers("p.A"), Some(vec![1_000]));
        assert_eq!(all.extension_numbers("p.E"), Some(vec![]));
        assert_eq!(names(all.file("other.proto")), ["other.proto"]);
        assert_eq!(
            (all.symbol("p.T"), all.file("x"), all.extension_numbers("x")),
            (None, None, None)
        );
    }

    #[test]
    fn the_built_in_set_is_looked_through() {
        let all = Declarations::of_set(proto::FILE_DESCRIPTOR_SET).unwrap();
        let files = all.symbol("inference.GRPCInferenceService.ModelInfer").unwrap();
        assert!(files.len() > 1, "with what it imports");
        assert_eq!(Declarations::of_set(&all.to_set()), Ok(all));
    }

    #[test]
    fn circles_and_nameless_files_are_refused() {
        let circle = |imports: &[&[&str]]| {
            let files =
                imports.iter().enumerate().map(|(i, imports)| file(&i.to_string(), imports));
            Declarations::new(files.map(|file| file.encode_to_vec()).collect::<Vec<_>>())
        };
        assert!(matches!(circle(&[&["0"]]), Err(DeclarationError::Circle(_))));
        assert!(matches!(circle(&[&["1"], &["2"], &["0"], &[]]), Err(DeclarationError::Circle(_))));
        assert!(circle(&[&["1", "2"], &["2"], &["gone"]]).is_ok());
        assert_eq!(Declarations::new([vec![]]), Err(DeclarationError::Nameless));
    }

    #[test]
    fn a_file_of_nothing_but_symbols_is_bounded() {
        let values: Vec<_> = (0..SYMBOLS_MAX + 10)
            .map(|i| EnumDescriptorProto { name: Some(format!("E{i}")), ..Default::default() })
            .collect();
        let many = FileDescriptorProto { enum_type: values, ..file("many.proto", &[]) };
        let all = Declarations::new([many.encode_to_vec()]).unwrap();
        assert_eq!(all.symbols.len(), SYMBOLS_MAX);
        let mut deep = DescriptorProto::default();
        for _ in 0..90 {
            deep = DescriptorProto {
                name: Some("D".into()),
                nested_type: vec![deep],
                ..Default::default()
            };
        }
        let deep = FileDescriptorProto { message_type: vec![deep], ..file("deep.proto", &[]) };
        let all = Declarations::new([deep.encode_to_vec()]).unwrap();
        assert!(all.symbols.len() <= DEPTH_MAX + 1);
    }

    #[test]
    fn no_bytes_panic() {
        let mut rng = StdRng::seed_from_u64(3);
        let good = rich().encode_to_vec();
        for round in 0..20_000 {
            let mut bytes = good.clone();
            match round % 4 {
                0 => rng.fill_bytes(&mut bytes),
                1 => bytes.truncate(rng.random_range(0..bytes.len())),
                _ => {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] ^= 1 << rng.random_range(0..8);
                }
            }
            drop(Declarations::new([bytes]));
        }
    }
}
