"""An independent judge of the corpus: does a value from outside reach a dangerous call?

It follows values through the syntax tree and shares nothing with the generator but the meaning of
the calls. A value is tainted where it may be, on any path.
"""

import ast

SOURCES = {"request.args.get", "request.form", "request.cookies.get", "os.environ.get"}
SOURCES |= {"sys.argv", "input"}
CLEANERS = {"shlex.quote", "shell_escape", "escape_sql", "connection.literal", "secure_filename"}
CLEANERS |= {"os.path.basename", "html.escape", "bleach.clean"}
SINKS = {"os.system", "subprocess.call", "cursor.execute", "connection.executescript", "open"}
SINKS |= {"send_file", "response.write", "render_template_string"}


def reaches_sink(source: str) -> bool:
    judge = _Judge()
    judge.run(ast.parse(source).body[0].body, set())
    return judge.found


class _Judge:
    def __init__(self) -> None:
        self.found = False

    def run(self, body: list[ast.stmt], tainted: set[str]) -> set[str]:
        for statement in body:
            tainted = self.step(statement, tainted)
        return tainted

    def step(self, node: ast.stmt, tainted: set[str]) -> set[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            return tainted
        if isinstance(node, ast.If):
            self.calls(node.test, tainted)
            return self.run(node.body, set(tainted)) | self.run(node.orelse, set(tainted))
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if any(blocks):
            ends = [self.run(block, set(tainted)) for block in blocks]
            return tainted.union(*ends)
        self.calls(node, tainted)
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Name):
                dirty = self.tainted(node.value, tainted)
                tainted = tainted | {target.id} if dirty else tainted - {target.id}
        return tainted

    def calls(self, node: ast.AST, tainted: set[str]) -> None:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in SINKS:
                self.found |= any(self.tainted(argument, tainted) for argument in call.args)

    def tainted(self, node: ast.AST, names: set[str]) -> bool:
        if isinstance(node, ast.Name):
            return node.id in names
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CLEANERS:
            return False
        head = getattr(node, "func", getattr(node, "value", None))
        if isinstance(node, ast.Call | ast.Subscript) and ast.unparse(head) in SOURCES:
            return True
        return any(self.tainted(child, names) for child in ast.iter_child_nodes(node))
