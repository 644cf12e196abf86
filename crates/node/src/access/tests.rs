//! Every way to be known, and every way not to be.

use std::time::{Duration, UNIX_EPOCH};

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
        RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
    },
};
use data_encoding::BASE64URL_NOPAD;
use serde_json::{Value, json};
use tonic::Code;

use super::*;

const NOW_S: u64 = 1_800_000_000;
const KEY: &str = "sk-the-lab-1";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn now() -> SystemTime {
    at(NOW_S)
}

fn hex(key: &str) -> String {
    data_encoding::HEXLOWER.encode(&api_keys::sha256(key.as_bytes()))
}

fn access(text: &str) -> Access {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.toml");
    std::fs::write(&path, format!("[node]\nname = \"a\"\n{text}")).unwrap();
    Access::load(&Config::load(&path, &[]).unwrap(), None).unwrap()
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(*name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

/// Who calls with these headers: the tenant, or code and text of the refusal.
async fn who(access: &Access, pairs: &[(&'static str, &str)]) -> Result<String, (Code, String)> {
    let mut headers = headers(pairs);
    let found = access.who(&mut headers, &[], None, now()).await;
    if found.is_ok() {
        assert!(!headers.contains_key("authorization") && !headers.contains_key("x-api-key"));
    }
    let by = crate::refusal::Who { node: "a".into(), region: "eu".into() };
    found.map(|tenant| tenant.name().to_string()).map_err(|refusal| {
        let status = refusal.status(&by);
        for (_, value) in pairs {
            let secret = value.rsplit(' ').next().unwrap();
            assert!(
                ["", "Bearer"].contains(&secret) || !status.message().contains(secret),
                "{status}"
            );
        }
        (status.code(), status.message().to_owned())
    })
}

fn lab() -> Access {
    access(&format!(
        "[[tenant]]\nname = \"lab\"\napi_key_sha256 = [\"{}\", \"{}\"]\n[[tenant]]\nname = \"shop\"\n\
         api_key_sha256 = \"{}\"\n[[tenant]]\nname = \"public\"\n[access]\nanonymous = \"public\"",
        hex("another"),
        hex(KEY),
        hex("shops"),
    ))
}

#[tokio::test]
async fn a_key_is_that_of_its_tenant_wherever_it_stands() {
    let access = lab();
    let bearer = format!("Bearer {KEY}");
    for (shown, want) in [
        (&[("x-api-key", KEY)][..], "lab"),
        (&[("authorization", bearer.as_str())], "lab"),
        (&[("authorization", "bearer  another")], "lab"),
        (&[("x-api-key", "shops")], "shop"),
        // No issuer is configured, so it is a key however it looks.
        (&[], "public"),
    ] {
        assert_eq!(who(&access, shown).await.unwrap(), want, "{shown:?}");
    }
}

#[tokio::test]
async fn a_key_that_is_nobodys_is_refused_even_where_anybody_may_call() {
    let access = lab();
    for wrong in ["sk-the-lab-2", "sk-the-lab-", "SK-THE-LAB-1", "a.b.c", &"x".repeat(10_000)] {
        let (code, why) = who(&access, &[("x-api-key", wrong)]).await.unwrap_err();
        assert_eq!(code, Code::Unauthenticated, "{why}");
        assert!(why.contains("api_key_sha256"), "{why}");
    }
    for wrong in ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", KEY, ""] {
        let (code, why) = who(&access, &[("authorization", wrong)]).await.unwrap_err();
        assert_eq!(code, Code::Unauthenticated, "{why}");
    }
}

#[tokio::test]
async fn more_than_one_credential_is_malformed() {
    let access = lab();
    for shown in [
        &[("x-api-key", KEY), ("authorization", "Bearer sk-the-lab-1")][..],
        &[("x-api-key", KEY), ("x-api-key", KEY)],
        &[("authorization", "Bearer sk-the-lab-1"), ("authorization", "Bearer another")],
    ] {
        assert_eq!(who(&access, shown).await.unwrap_err().0, Code::InvalidArgument);
    }
}

#[tokio::test]
async fn without_configuration_nobody_is_known() {
    let access = access("");
    for shown in [&[][..], &[("x-api-key", KEY)], &[("authorization", "Bearer a.b.c")]] {
        assert_eq!(who(&access, shown).await.unwrap_err().0, Code::Unauthenticated);
    }
}

#[test]
fn a_tenant_may_call_what_a_rule_names_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("node.toml");
    let text = "[node]\nname = \"a\"\n[[tenant]]\nname = \"lab-1\"\n[[tenant]]\nname = \"shop\"\n[[tenant]]\nname = \"none\"\n\
                [[allow]]\ntenant = \"lab-*\"\nmodels = [\"llama-*\", \"bert\"]\n\
                [[allow]]\ntenant = \"lab-1\"\nservices = [\"my.pkg.*\"]\n\
                [[allow]]\ntenant = \"shop\"\n\
                [[allow]]\ntenant = \"lab-1\"\nmodels = [\"m\"]\nservices = [\"my.other.S\"]\n";
    std::fs::write(&path, text).unwrap();
    let config = Config::load(&path, &[]).unwrap();
    let tenant = |name: &str| Tenant::new(name.parse().unwrap(), &config.allow);
    let (lab, shop, none) = (tenant("lab-1"), tenant("shop"), tenant("none"));
    let live = "/inference.GRPCInferenceService/ServerLive";
    for (tenant, path, want) in [
        (&lab, INFER, Verdict::ForSomeModels),
        (&lab, "/my.pkg.S/M", Verdict::Allowed),
        // No model is read from these, so a rule that names models covers none of them.
        (&lab, live, Verdict::Refused),
        (&lab, "/my.other.S/M", Verdict::Refused),
        (&shop, INFER, Verdict::Allowed),
        (&shop, "/any.thing/Else", Verdict::Allowed),
        (&none, INFER, Verdict::Refused),
    ] {
        assert_eq!(tenant.may_call(path), want, "{path}");
    }
    for (model, want) in [("llama-3", true), ("bert", true), ("bert-2", false), ("m", false)] {
        assert_eq!(lab.may_call_model(INFER, &model.parse().unwrap()), want, "{model}");
    }
}

#[tokio::test]
async fn a_certificate_is_that_of_the_tenant_its_names_are_of() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, "").unwrap();
    let access = access(&format!(
        "[tls]\nclient_ca = {ca:?}\n[[tenant]]\nname = \"search\"\napi_key_sha256 = \"{}\"\n\
         certificates = [\"spiffe://mesh.example/client/eu/search\"]\n\
         [[tenant]]\nname = \"shop\"\ncertificates = [\"Shop.example\", \"https://shop.example/own\"]\n\
         [[tenant]]\nname = \"public\"\n\
         [access]\nanonymous = \"public\"",
        hex(KEY)
    ));
    let certificate = |names: &[&str]| {
        let mut params = rcgen::CertificateParams::new([]).unwrap();
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.strip_prefix("dns:") {
                Some(host) => rcgen::SanType::DnsName(host.try_into().unwrap()),
                None if name.contains("://") => rcgen::SanType::URI((*name).try_into().unwrap()),
                None => rcgen::SanType::DnsName((*name).try_into().unwrap()),
            })
            .collect();
        let key = rcgen::KeyPair::generate().unwrap();
        CertificateDer::from(params.self_signed(&key).unwrap())
    };
    let known = "spiffe://mesh.example/client/eu/search";
    for (names, want) in [
        (&[known][..], Ok("search")),
        (&["x.example", known], Ok("search")),
        (&["SHOP.example"], Ok("shop")),
        (&["SHOP.example", "https://shop.example/a"], Ok("shop")),
        (&["https://shop.example/own", "x.example"], Ok("shop")),
        // Beside a SPIFFE id no DNS name counts: whoever joined as `shop.example` is not that tenant.
        (&[known, "shop.example"], Ok("search")),
        (&["spiffe://mesh.example/node/eu/x", "shop.example"], Err(CertificateError::Unknown)),
        (&["shop.example", "SPIFFE://other.example/any/path"], Err(CertificateError::Unknown)),
        (&["spiffe://mesh.example/client/eu/other"], Err(CertificateError::Unknown)),
        (&["dns:spiffe://mesh.example/client/eu/search"], Err(CertificateError::Unknown)),
        (&[], Err(CertificateError::Unknown)),
        (&[known, "https://shop.example/own"], Err(CertificateError::Ambiguous)),
    ] {
        let shown = [certificate(names)];
        // Read, then remembered.
        for _ in 0..2 {
            let found = access.certificates.find(&shown[0], now());
            let found = found.map(|tenant| tenant.name().to_string());
            assert_eq!(found, want.map(str::to_owned), "{names:?}");
        }
        let mut none = HeaderMap::new();
        let found = access.who(&mut none, &shown, None, now()).await;
        assert_eq!(
            found.is_ok(),
            want.is_ok(),
            "anonymous is not for those who show a certificate"
        );
        let mut key = headers(&[("x-api-key", KEY)]);
        let found = access.who(&mut key, &shown, None, now()).await.unwrap();
        assert_eq!(found.name().as_str(), "search", "a key comes before a certificate");
    }
    let late = at(2_000_000_000);
    let found = access.certificates.find(&certificate(&[known]), late);
    assert_eq!(found.unwrap_err(), CertificateError::Expired);
}

#[test]
fn members_of_the_mesh_are_tenants_by_their_whole_id_only() {
    use identity::{Authority, CertificateRequest, SpiffeId};

    let dir = tempfile::tempdir().unwrap();
    let (domain, life) = ("mesh.example".parse().unwrap(), Duration::from_secs(3600));
    let began = base::clock::wall();
    Authority::init(dir.path(), &domain, life, began).unwrap();
    let authority = Authority::open(dir.path(), began).unwrap();
    let path = dir.path().join("node.toml");
    let text = "[node]\nname = \"a\"\n[tls]\nclient_ca = \"c\"\n[[tenant]]\nname = \"billing\"\n\
                certificates = [\"billing\", \"spiffe://mesh.example/client/eu/billing\"]\n\
                [[tenant]]\nname = \"relay\"\ncertificates = [\"spiffe://mesh.example/node/us/billing\"]\n";
    std::fs::write(&path, text).unwrap();
    let access = Access::load(&Config::load(&path, &[]).unwrap(), None).unwrap();
    let (unknown, billing) = (Err(CertificateError::Unknown), Ok("billing"));
    for (id, want) in [
        ("spiffe://mesh.example/client/eu/billing", billing),
        ("spiffe://mesh.example/client/us/billing", unknown),
        ("spiffe://mesh.example/node/eu/billing", unknown),
        ("spiffe://mesh.example/authority/eu/billing", unknown),
        ("spiffe://mesh.example/operator/eu/billing", unknown),
        ("spiffe://mesh.example/node/us/billing", Ok("relay")),
    ] {
        let request = CertificateRequest::new().unwrap();
        let id: SpiffeId = id.parse().unwrap();
        let chain = authority.sign(&id, request.csr(), &[], began).unwrap();
        let found = access.certificates.find(&chain[0], began);
        let found = found.map(|tenant| tenant.name().to_string());
        assert_eq!(found, want.map(str::to_owned), "{id}");
    }
}

#[test]
fn a_client_of_the_mesh_that_is_revoked_is_refused() {
    use base::clock;
    use identity::{Authority, CertificateRequest, Identity, NodeIdentity, SpiffeId};

    let dir = tempfile::tempdir().unwrap();
    let (domain, life) = ("mesh.example".parse().unwrap(), Duration::from_secs(3600));
    Authority::init(dir.path(), &domain, life, clock::wall()).unwrap();
    let issue = |id: &SpiffeId| {
        let (authority, request) = (
            Authority::open(dir.path(), clock::wall()).unwrap(),
            CertificateRequest::new().unwrap(),
        );
        let chain = authority.sign(id, request.csr(), &[], clock::wall()).unwrap();
        (chain, request.into_key(), authority)
    };
    let (chain, key, authority) = issue(&"spiffe://mesh.example/node/eu/a".parse().unwrap());
    let node = NodeIdentity::issued(dir.path(), chain, key, authority.roots(), clock::wall());
    let mesh = Identity::new(node.unwrap());
    let path = dir.path().join("node.toml");
    let text = "[node]\nname = \"a\"\n[tls]\nclient_ca = \"c\"\n[[tenant]]\nname = \"search\"\n\
                certificates = [\"spiffe://mesh.example/client/eu/search\"]\n";
    std::fs::write(&path, text).unwrap();
    let access = Access::load(&Config::load(&path, &[]).unwrap(), Some(mesh.clone())).unwrap();
    let client: SpiffeId = "spiffe://mesh.example/client/eu/search".parse().unwrap();
    let (chain, ..) = issue(&client);
    assert!(access.certificates.find(&chain[0], clock::wall()).is_ok());

    authority.revoke(&client, clock::wall()).unwrap();
    mesh.revoke(&authority.revoked().unwrap(), clock::wall());
    let found = access.certificates.find(&chain[0], clock::wall());
    assert_eq!(found.unwrap_err(), CertificateError::Revoked);
}

/// Keys of an issuer, in a file that can be written anew.
struct Issuing {
    dir: tempfile::TempDir,
    rsa: RsaKeyPair,
    ec: EcdsaKeyPair,
    ed: Ed25519KeyPair,
}

fn base64(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}

impl Issuing {
    fn new() -> Self {
        let issuing = Self {
            dir: tempfile::tempdir().unwrap(),
            rsa: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
            ec: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            ed: Ed25519KeyPair::generate().unwrap(),
        };
        issuing.write(&[issuing.rsa_jwk("r1"), issuing.ec_jwk("e1"), issuing.ed_jwk("d1")]);
        issuing
    }

    fn rsa_jwk(&self, id: &str) -> Value {
        let key = self.rsa.public_key();
        let n = base64(key.modulus().big_endian_without_leading_zero());
        let e = base64(key.exponent().big_endian_without_leading_zero());
        json!({ "kty": "RSA", "kid": id, "use": "sig", "n": n, "e": e })
    }

    fn ec_jwk(&self, id: &str) -> Value {
        let (x, y) = self.ec.public_key().as_ref()[1..].split_at(32);
        json!({ "kty": "EC", "crv": "P-256", "kid": id, "alg": "ES256", "x": base64(x), "y": base64(y) })
    }

    fn ed_jwk(&self, id: &str) -> Value {
        json!({ "kty": "OKP", "crv": "Ed25519", "kid": id, "x": base64(self.ed.public_key().as_ref()) })
    }

    fn write(&self, keys: &[Value]) {
        let unusable = [
            json!({ "kty": "oct", "kid": "h1", "k": base64(b"secret") }),
            json!({ "kty": "XYZ" }),
            json!(5),
        ];
        let keys: Vec<_> = unusable.iter().chain(keys).collect();
        std::fs::write(self.path(), json!({ "keys": keys }).to_string()).unwrap();
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keys.json")
    }

    fn access(&self) -> Access {
        access(&format!(
            "[[access.jwt]]\nissuer = \"https://login.example\"\naudience = \"isobar\"\njwks = {:?}\n\
             [[access.jwt]]\nissuer = \"other\"\naudience = \"isobar\"\njwks = {:?}\ntenant_claim = \"tid\"\n\
             [[tenant]]\nname = \"lab\"\napi_key_sha256 = \"{}\"\n[[tenant]]\nname = \"shop\"\n\
             jwt = [\"https://login.example#subject-1\", \"https://login.example#s#2\", \"other#both\"]\n\
             [[tenant]]\nname = \"club\"\njwt = [\"other#lab\", \"https://login.example#both\"]\n",
            self.path(),
            self.path(),
            hex(KEY),
        ))
    }

    fn sign(&self, algorithm: &str, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let rsa = |padding: &'static dyn RsaEncoding| {
            let mut signature = vec![0; self.rsa.public_modulus_len()];
            self.rsa.sign(padding, &random, message, &mut signature).unwrap();
            signature
        };
        match algorithm {
            "RS256" => rsa(&RSA_PKCS1_SHA256),
            "PS256" => rsa(&RSA_PSS_SHA256),
            "ES256" => self.ec.sign(&random, message).unwrap().as_ref().to_vec(),
            "EdDSA" => self.ed.sign(message).as_ref().to_vec(),
            // With what everybody can read as the secret: the public key.
            "HS256" => {
                let secret = self.rsa.public_key().as_ref().to_vec();
                let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret);
                aws_lc_rs::hmac::sign(&key, message).as_ref().to_vec()
            }
            "none" => vec![],
            other => panic!("{other}"),
        }
    }

    fn token_of(&self, header: &Value, claims: &Value) -> String {
        let [header_text, claims] =
            [header, claims].map(|part| base64(part.to_string().as_bytes()));
        let message = format!("{header_text}.{claims}");
        let signature = self.sign(header["alg"].as_str().unwrap(), message.as_bytes());
        format!("{message}.{}", base64(&signature))
    }

    fn token(&self, algorithm: &str, id: &str, claims: &Value) -> String {
        self.token_of(&json!({ "alg": algorithm, "kid": id, "typ": "JWT" }), claims)
    }
}

fn claims() -> Value {
    json!({ "iss": "https://login.example", "aud": "isobar", "sub": "subject-1", "exp": NOW_S + 600 })
}

fn with(key: &str, value: impl Into<Value>) -> Value {
    let mut claims = claims();
    claims[key] = value.into();
    claims
}

fn without(key: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(key);
    claims
}

fn verdict(access: &Access, token: &str) -> Result<String, TokenError> {
    access.tokens.verify(token, now()).map(|tenant| tenant.name().to_string())
}

#[tokio::test]
async fn a_token_is_that_of_the_tenant_its_claim_stands_for() {
    let issuing = Issuing::new();
    let access = issuing.access();
    for (algorithm, id) in [("RS256", "r1"), ("PS256", "r1"), ("ES256", "e1"), ("EdDSA", "d1")] {
        let token = issuing.token(algorithm, id, &claims());
        let bearer = format!("Bearer {token}");
        assert_eq!(
            who(&access, &[("authorization", &bearer)]).await.unwrap(),
            "shop",
            "{algorithm}"
        );
    }
    let key = format!("Bearer {KEY}");
    assert_eq!(
        who(&access, &[("authorization", &key)]).await.unwrap(),
        "lab",
        "no token, so a key"
    );
    let mut other = with("iss", "other");
    other["tid"] = "lab".into();
    let mut others = other.clone();
    others["tid"] = "subject-1".into();
    let mut both = other.clone();
    both["tid"] = "both".into();
    for (claims, want) in [
        (with("sub", "s#2"), Ok("shop")),
        (with("aud", json!(["x", "isobar"])), Ok("shop")),
        (with("exp", 1_800_000_000.5), Ok("shop")),
        // What one issuer says is nothing to the tenants of another.
        (other, Ok("club")),
        (others, Err(TokenError::NoTenant)),
        (both, Ok("shop")),
        (with("sub", "both"), Ok("club")),
        // No tenant goes by its name: not one that lists other claims, and not one that has only a key.
        (with("sub", "shop"), Err(TokenError::NoTenant)),
        (with("sub", "lab"), Err(TokenError::NoTenant)),
        (with("sub", "https://login.example#subject-1"), Err(TokenError::NoTenant)),
        (with("sub", json!(["lab"])), Err(TokenError::Malformed)),
        (without("sub"), Err(TokenError::NoTenant)),
    ] {
        let found = verdict(&access, &issuing.token("RS256", "r1", &claims));
        assert_eq!(found, want.map(str::to_owned), "{claims}");
    }
    // Without a name, the one key that would do; here two issuers share it, each has one of each kind.
    let unnamed = issuing.token_of(&json!({ "alg": "ES256" }), &claims());
    assert_eq!(verdict(&access, &unnamed).unwrap(), "shop");
}

#[test]
fn a_claim_without_an_issuer_is_the_only_issuers() {
    let issuing = Issuing::new();
    let jwt = |audience: &str| {
        format!(
            "[[access.jwt]]\nissuer = \"https://login.example\"\naudience = \"{audience}\"\njwks = {:?}\n",
            issuing.path()
        )
    };
    let tenant =
        "[[tenant]]\nname = \"shop\"\njwt = [\"subject-1\", \"https://login.example#s2\"]\n";
    let access = access(&format!("{}{}{tenant}", jwt("isobar"), jwt("more")));
    for claims in [claims(), with("aud", "more"), with("sub", "s2")] {
        let found = verdict(&access, &issuing.token("RS256", "r1", &claims));
        assert_eq!(found, Ok("shop".to_owned()), "{claims}");
    }
}

#[test]
fn a_token_is_for_this_node_and_of_its_time() {
    let issuing = Issuing::new();
    let access = issuing.access();
    for (claims, want) in [
        (with("iss", "https://login.example.evil"), TokenError::Issuer),
        (with("iss", json!(["https://login.example"])), TokenError::Issuer),
        (without("iss"), TokenError::Issuer),
        (with("aud", "another"), TokenError::Issuer),
        (with("aud", json!(["another"])), TokenError::Issuer),
        (without("aud"), TokenError::Issuer),
        (with("exp", NOW_S - 30), TokenError::Expired),
        (with("exp", 0), TokenError::Expired),
        (without("exp"), TokenError::NoExpiry),
        (with("exp", "never"), TokenError::Malformed),
        (with("exp", -5), TokenError::Malformed),
        (with("nbf", NOW_S + 31), TokenError::NotYet),
        (with("nbf", "soon"), TokenError::Malformed),
    ] {
        let found = verdict(&access, &issuing.token("RS256", "r1", &claims));
        assert_eq!(found, Err(want), "{claims}");
    }
    for good in [with("exp", NOW_S - 29), with("nbf", NOW_S + 30), with("nbf", NOW_S - 5)] {
        assert!(verdict(&access, &issuing.token("RS256", "r1", &good)).is_ok(), "{good}");
    }
}

#[test]
fn a_token_is_signed_with_the_key_it_names_in_the_way_that_key_is_for() {
    let issuing = Issuing::new();
    let access = issuing.access();
    for (algorithm, id, want) in [
        // The public key as the secret of an HMAC, and no signature at all.
        ("HS256", "r1", TokenError::Algorithm),
        ("HS256", "h1", TokenError::Algorithm),
        ("none", "r1", TokenError::Malformed),
        ("ES256", "r1", TokenError::Algorithm),
        ("RS256", "e1", TokenError::Algorithm),
        ("EdDSA", "e1", TokenError::Algorithm),
        ("RS256", "h1", TokenError::UnknownKey(0)),
        ("RS256", "r2", TokenError::UnknownKey(0)),
    ] {
        let found = verdict(&access, &issuing.token(algorithm, id, &claims()));
        assert_eq!(found, Err(want), "{algorithm} {id}");
    }
    let foreign = Issuing::new().token("RS256", "r1", &claims());
    assert_eq!(verdict(&access, &foreign), Err(TokenError::Signature));

    let good = issuing.token("RS256", "r1", &claims());
    let parts: Vec<_> = good.split('.').collect();
    let forged = base64(with("sub", "lab").to_string().as_bytes());
    for (token, want) in [
        (format!("{}.{forged}.{}", parts[0], parts[2]), TokenError::Signature),
        (format!("{}.{}.", parts[0], parts[1]), TokenError::Signature),
        (format!("{}.{}.AAAA", parts[0], parts[1]), TokenError::Signature),
        (format!("x{good}"), TokenError::Malformed),
        (format!("{}.!!.{}", parts[0], parts[2]), TokenError::Malformed),
        ("a.b.c".to_owned(), TokenError::Malformed),
        ("..".to_owned(), TokenError::Malformed),
        (format!("{good}{}", "A".repeat(8 << 10)), TokenError::TooLong),
    ] {
        assert_eq!(verdict(&access, &token), Err(want));
    }
    let critical = json!({ "alg": "RS256", "kid": "r1", "crit": ["b64"], "b64": false });
    let critical = issuing.token_of(&critical, &claims());
    assert_eq!(verdict(&access, &critical), Err(TokenError::Malformed));
}

#[test]
fn a_key_of_two_that_would_do_must_be_named() {
    let issuing = Issuing::new();
    issuing.write(&[issuing.rsa_jwk("r1"), Issuing::new().rsa_jwk("r2")]);
    let access = issuing.access();
    let unnamed = issuing.token_of(&json!({ "alg": "RS256" }), &claims());
    assert_eq!(verdict(&access, &unnamed), Err(TokenError::UnnamedKey));
}

#[test]
fn a_key_for_something_else_is_not_used() {
    let issuing = Issuing::new();
    let mut encrypting = issuing.rsa_jwk("r1");
    encrypting["use"] = "enc".into();
    let mut other = issuing.rsa_jwk("r2");
    other["alg"] = "RSA-OAEP".into();
    let mut only_pss = issuing.rsa_jwk("r3");
    only_pss["alg"] = "PS256".into();
    issuing.write(&[encrypting, other, only_pss]);
    let access = issuing.access();
    for (algorithm, id, want) in [
        ("RS256", "r1", Err(TokenError::UnknownKey(0))),
        ("RS256", "r2", Err(TokenError::UnknownKey(0))),
        ("RS256", "r3", Err(TokenError::Algorithm)),
        ("PS256", "r3", Ok("shop".to_owned())),
    ] {
        assert_eq!(verdict(&access, &issuing.token(algorithm, id, &claims())), want);
    }
}

#[tokio::test]
async fn a_token_is_remembered_until_it_expires_or_its_keys_change() {
    let issuing = Issuing::new();
    let access = issuing.access();
    let token = issuing.token("RS256", "r1", &claims());
    assert!(access.tokens.verify(&token, now()).is_ok());
    assert!(access.tokens.verify(&token, at(NOW_S + 629)).is_ok());
    assert_eq!(access.tokens.verify(&token, at(NOW_S + 630)).unwrap_err(), TokenError::Expired);
    // A key that is withdrawn takes its tokens along; a reading that fails does not.
    let issuer = access.tokens.issuers().next().unwrap().clone();
    std::fs::write(issuing.path(), "no keys").unwrap();
    assert!(!issuer.read(&access.fetch).await);
    assert!(access.tokens.verify(&token, now()).is_ok());
    issuing.write(&[issuing.ec_jwk("e1")]);
    assert!(issuer.read(&access.fetch).await);
    assert_eq!(access.tokens.verify(&token, now()).unwrap_err(), TokenError::UnknownKey(0));
}

#[tokio::test]
async fn an_issuer_that_withdraws_every_key_is_believed() {
    let issuing = Issuing::new();
    let access = issuing.access();
    let token = issuing.token("RS256", "r1", &claims());
    let unnamed = issuing.token_of(&json!({ "alg": "RS256" }), &claims());
    let issuer = access.tokens.issuers().next().unwrap().clone();
    // Nothing at all, and what is no use for signatures.
    let encrypting = json!({ "keys": [{ "kty": "oct", "kid": "h1", "k": "AAAA" }] });
    for empty in [json!({ "keys": [] }), encrypting] {
        issuing.write(&[issuing.rsa_jwk("r1")]);
        assert!(issuer.read(&access.fetch).await);
        assert!(access.tokens.verify(&token, now()).is_ok());
        std::fs::write(issuing.path(), empty.to_string()).unwrap();
        assert!(issuer.read(&access.fetch).await, "{empty}");
        for token in [&token, &unnamed] {
            let found = access.tokens.verify(token, now());
            assert_eq!(found.unwrap_err(), TokenError::UnknownKey(0), "{empty}");
        }
    }
    // A node that starts then has none either.
    std::fs::write(issuing.path(), "{\"keys\": []}").unwrap();
    let found = issuing.access().tokens.verify(&token, now());
    assert_eq!(found.unwrap_err(), TokenError::UnknownKey(0));
}

#[test]
fn a_file_of_keys_must_be_there_and_be_of_signatures() {
    let issuing = Issuing::new();
    let text =
        format!("[[access.jwt]]\nissuer = \"i\"\naudience = \"a\"\njwks = {:?}\n", issuing.path());
    let error = |content: Option<&str>| {
        match content {
            Some(content) => std::fs::write(issuing.path(), content).unwrap(),
            None => std::fs::remove_file(issuing.path()).unwrap(),
        }
        let path = issuing.dir.path().join("node.toml");
        std::fs::write(&path, format!("[node]\nname = \"a\"\n{text}")).unwrap();
        Access::load(&Config::load(&path, &[]).unwrap(), None).unwrap_err().to_string()
    };
    assert!(error(Some("{")).contains("no JWK set"));
    assert!(error(Some("{\"keys\": {}}")).contains("no JWK set"));
    assert!(
        error(Some("{\"keys\": [{\"kty\": \"oct\", \"k\": \"AAAA\"}]}")).contains("no public key")
    );
    assert!(error(None).contains("cannot be read"));
}

#[test]
fn three_parts_in_base64url_look_like_a_token() {
    for yes in ["a.b.c", "A-_0.b.c"] {
        assert!(tokens::looks_like_one(yes.as_bytes()), "{yes}");
    }
    for no in ["", "a.b", "a.b.c.d", "a..c", "a.b.", "a.b.c=", "sk-1", "a.b c.d"] {
        assert!(!tokens::looks_like_one(no.as_bytes()), "{no}");
    }
}
