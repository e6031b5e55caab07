//! kubeconform, with schemas that are made of what a real API server says of its kinds.
//!
//! Its own schemas come from the network, and lag behind. An API server describes every kind that it serves, custom
//! resources too, at `/openapi/v2`; that is nearly JSON Schema, and made strict here: what is not described is wrong.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::Method;
use serde_json::{Map, Value, json};

use crate::kubernetes::ControlPlane;
use crate::process;
use crate::scratch::Scratch;
use crate::tools;

/// What a quantity is called there: a number may be written without quotes.
const QUANTITY: &str = "io.k8s.apimachinery.pkg.api.resource.Quantity";
/// The same of a port, or of a share.
const NUMBER_OR_TEXT: &str = "io.k8s.apimachinery.pkg.util.intstr.IntOrString";

/// Schemas of all kinds of a control plane.
pub struct Schemas {
    dir: Scratch,
}

impl Schemas {
    /// Those of what this API server serves now.
    pub async fn of(plane: &ControlPlane) -> Result<Self> {
        let dir = Scratch::new()?;
        let document = plane.call(Method::GET, "/openapi/v2", None).await?;
        let definitions = document["definitions"].as_object().context("no definitions")?;
        let definitions: Map<_, _> = definitions.iter().map(|(name, one)| (name.clone(), strict(name, one))).collect();
        for (name, definition) in &definitions {
            for kind in definition["x-kubernetes-group-version-kind"].as_array().into_iter().flatten() {
                let mut used = BTreeSet::new();
                reach(&definitions, name, &mut used);
                let used: Map<_, _> = used.into_iter().map(|name| (name.clone(), definitions[&name].clone())).collect();
                let schema = json!({ "$ref": format!("#/definitions/{name}"), "definitions": used });
                fs::write(dir.join(file(kind)?), schema.to_string())?;
            }
        }
        Ok(Self { dir })
    }

    /// What is wrong with these objects, for people: nothing, if they conform.
    pub async fn check(&self, objects: &[Value]) -> Result<Vec<String>> {
        // By the end of its name it is taken for YAML.
        let file = self.dir.join(format!("{}.yaml", crate::scratch::unique()));
        let documents: Vec<_> = objects.iter().map(ToString::to_string).collect();
        // JSON is YAML.
        fs::write(&file, documents.join("\n---\n"))?;
        let mut command = process::command(tools::kubeconform().context("no kubeconform")?);
        command.args(["-strict", "-output", "json", "-verbose", "-schema-location"]);
        command.arg(self.dir.join("{{ .ResourceKind }}{{ .KindSuffix }}.json"));
        command.arg(&file);
        let output = process::run("kubeconform", command, Duration::from_secs(60)).await?;
        let report: Value = serde_json::from_str(&output.stdout).with_context(|| output.stdout + &output.stderr)?;
        let verdicts = report["resources"].as_array().context("no verdicts")?;
        anyhow::ensure!(verdicts.len() == objects.len(), "{} verdicts on {} objects", verdicts.len(), objects.len());
        let wrong = verdicts.iter().filter(|verdict| verdict["status"] != "statusValid");
        Ok(wrong.map(ToString::to_string).collect())
    }
}

/// The name under which kubeconform looks for a kind: `daemonset-apps-v1.json`.
fn file(kind: &Value) -> Result<String> {
    let text = |key: &str| kind[key].as_str().with_context(|| format!("{kind} has no {key}"));
    let group = text("group")?.split('.').next().filter(|group| !group.is_empty());
    let group = group.map_or_else(String::new, |group| format!("{group}-"));
    Ok(format!("{}-{group}{}.json", text("kind")?, text("version")?).to_lowercase())
}

/// A definition that allows nothing which it does not describe.
fn strict(name: &str, definition: &Value) -> Value {
    match name {
        QUANTITY => return json!({ "type": ["string", "number"] }),
        NUMBER_OR_TEXT => return json!({ "type": ["string", "integer"] }),
        _ => {}
    }
    close(definition)
}

fn close(schema: &Value) -> Value {
    match schema {
        Value::Object(keys) => {
            let mut closed: Map<_, _> = keys.iter().map(|(key, value)| (key.clone(), close(value))).collect();
            if keys.get("format").is_some_and(|format| format == "int-or-string")
                || keys.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true))
            {
                return json!({ "type": ["string", "integer"] });
            }
            let is_open = keys.contains_key("additionalProperties")
                || keys.get("x-kubernetes-preserve-unknown-fields") == Some(&Value::Bool(true));
            // A field may be called `properties`: that one has no type beside it.
            if keys.get("properties").is_some_and(Value::is_object)
                && keys.get("type").is_some_and(Value::is_string)
                && !is_open
            {
                closed.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
            Value::Object(closed)
        }
        Value::Array(list) => list.iter().map(close).collect(),
        other => other.clone(),
    }
}

/// All definitions that one refers to, itself included.
fn reach(definitions: &Map<String, Value>, name: &str, used: &mut BTreeSet<String>) {
    if !used.insert(name.to_owned()) {
        return;
    }
    if let Some(definition) = definitions.get(name) {
        references(definition, &mut |name| reach(definitions, name, used));
    }
}

fn references(schema: &Value, tell: &mut impl FnMut(&str)) {
    match schema {
        Value::Object(keys) => {
            for (key, value) in keys {
                match value.as_str().and_then(|text| text.strip_prefix("#/definitions/")) {
                    Some(name) if key == "$ref" => tell(name),
                    _ => references(value, tell),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, tell)),
        _ => {}
    }
}
