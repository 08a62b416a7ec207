"""What pyproject.toml cannot say: tools/ and recipes/ lie inside the installed package, not beside it."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["megatron_ext*"]),
        "megatron_ext.tools",
        *(f"megatron_ext.tools.{name}" for name in find_packages("tools")),
        "megatron_ext.recipes",
    ],
    package_dir={"megatron_ext.tools": "tools", "megatron_ext.recipes": "recipes"},
    package_data={
        "megatron_ext.config": ["*.toml"],
        # of models/ the configurations: weights that were put there are not shipped
        "megatron_ext.recipes": [
            "*.md",
            "*/*.md",
            "papers/*/*.md",
            "**/*.toml",
            "prompts/*.jinja",
            "models/*/config.json",
            "tiny/**/*",
        ],
    },
)
